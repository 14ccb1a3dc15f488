"""A period's rows against the reference by Evidently: quiet without drift, which is found in its first period."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.drift_evidently import EvidentlyDrift
from infra.monitor_evidently import EvidentlyMonitor
from policies import monitor
from policies.monitor import Group, Seen
from policies.policy import Monitor
from policies.verdict import Verdict
from tasks.ports_monitor import Window

pytestmark = pytest.mark.e2e  # the worker takes some ten seconds to import Evidently

RULES = Monitor(every="1d")  # type: ignore[arg-type]
COLUMNS = ("age", "income", "visits")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvidentlyMonitor]:
    with EvidentlyDrift(rows_max=8000, timeout_s=240.0) as worker:
        yield EvidentlyMonitor(worker, tmp_path_factory.mktemp("workspace"))


def rows(generator: np.random.Generator, count: int, shift: float = 0.0) -> pa.Table:
    """Numbers with a long tail, a flag and a plain one; the last is shifted."""
    return pa.table(
        {
            "age": generator.lognormal(size=count),
            "income": generator.integers(0, 2, count),
            "visits": generator.normal(size=count) + shift,
            "carrier": generator.choice(["AA", "UA", "B6"], count),
            "prediction": generator.beta(2, 6, count),
        }
    )


def window(folder: Path, reference: pa.Table, live: pa.Table) -> Window:
    for name, table in (("reference", reference), ("live", live)):
        pq.write_table(table, folder / f"{name}.parquet")
    return Window(
        folder / "live.parquet", live.num_rows, live.num_rows // 2, folder / "reference.parquet", reference.num_rows,
        reference.num_rows // 2, "training rows", COLUMNS, ("carrier",), (),
    )  # fmt: skip


def look(detector: EvidentlyMonitor, found: Window) -> Verdict:
    whole, first, second = detector.compare(found, COLUMNS, "wasserstein", monitor.permutations(RULES))
    seen = Seen("m", "1", 0.0, 1.0, found.live_rows, "training rows", (Group("inputs", whole, (first, second)),))
    return monitor.judge(RULES, seen)[0].verdict


def test_periods_without_drift_raise_no_alarm_and_drift_is_found_in_its_first_period(
    detector: EvidentlyMonitor, tmp_path: Path
) -> None:
    generator = np.random.default_rng(5)
    reference = rows(generator, 2000)
    quiet = [look(detector, window(tmp_path, reference, rows(generator, 1200))) for _ in range(50)]
    assert Verdict.FAIL not in quiet
    assert look(detector, window(tmp_path, reference, rows(generator, 1200, shift=0.4))) is Verdict.FAIL


def test_text_is_compared_as_categories(detector: EvidentlyMonitor, tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    live = rows(generator, 1000)
    live = live.set_column(3, "carrier", pa.array(["AA"] * 800 + ["B6"] * 200))
    whole, *_ = detector.compare(window(tmp_path, rows(generator, 1000), live), ("carrier",), "jensenshannon", 199)
    assert whole.columns[0].statistic > 0.3


def test_each_period_is_a_page_and_a_run_of_the_model_s_project(detector: EvidentlyMonitor, tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    found = window(tmp_path, rows(generator, 500), rows(generator, 500))
    pages = [detector.snapshot("flight-delay", 1000.0 + n, found, tmp_path / f"{n}.html") for n in range(2)]
    assert all("</html>" in page.read_text() for page in pages)
    projects = list(detector._workspace.glob("*/metadata.json"))
    assert len(projects) == 1
    assert "flight-delay" in projects[0].read_text()
    assert len(list(projects[0].parent.glob("snapshots/*.json"))) == 2
