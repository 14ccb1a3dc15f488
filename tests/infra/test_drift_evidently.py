"""Windows compared by Evidently in its worker: what is found, what is not, and what is said where nothing can be."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.drift_evidently import METHODS, EvidentlyDrift
from tasks.ports import BadInput, NotThere, PortError

pytestmark = pytest.mark.e2e  # each worker takes some ten seconds to import Evidently


@pytest.fixture(scope="module")
def detector() -> Iterator[EvidentlyDrift]:
    with EvidentlyDrift(permutations=199, timeout_s=120.0) as started:
        yield started


def window(rows: int, seed: int, shift: float = 0.0, missing: float = 0.0, common: float = 0.5) -> pa.Table:
    generator = np.random.default_rng(seed)
    prediction = generator.beta(2, 6, rows) + shift
    prediction[generator.random(rows) < missing] = np.nan
    carrier = generator.choice(["AA", "UA", "B6"], rows, p=[common, 0.8 - common, 0.2])
    return pa.table({"prediction": prediction, "in.carrier": carrier, "in.hour": generator.integers(0, 24, rows)})


@pytest.mark.parametrize("method", METHODS)
def test_a_shift_is_found_and_equal_windows_are_not_called_different(detector: EvidentlyDrift, method: str) -> None:
    alike = detector.compare(window(600, 1), window(600, 2), ["prediction"], method)
    shifted = detector.compare(window(600, 1), window(600, 2, shift=0.1), ["prediction"], method)
    assert alike.p_value_max > 0.02
    assert shifted.p_value_max == 1 / 200
    assert shifted.columns[0].statistic > 2 * alike.columns[0].statistic
    assert alike.columns[0].high is not None
    assert alike.columns[0].high > alike.columns[0].statistic


def test_the_statistic_is_evidentlys_own(detector: EvidentlyDrift) -> None:
    """The normed Wasserstein distance: that of the samples over the reference's standard deviation."""
    from scipy.stats import wasserstein_distance

    first, second = window(600, 1), window(600, 2, shift=0.05)
    a, b = (table["prediction"].to_numpy() for table in (first, second))
    seen = detector.compare(first, second, ["prediction"], "wasserstein").columns[0].statistic
    assert seen == pytest.approx(wasserstein_distance(a, b) / np.std(a))


def test_the_upper_limit_is_rarely_below_the_true_distance(detector: EvidentlyDrift) -> None:
    """Windows 0.1 standard deviations apart: the limit that a pass is given by must say so."""
    sd = float(np.sqrt(2 * 6 / (8**2 * 9)))
    limits = []
    for seed in range(40):
        apart = detector.compare(window(800, seed), window(800, 1000 + seed, shift=0.1 * sd), ["prediction"])
        limits.append(apart.columns[0].high)
    assert sum(limit is not None and limit < 0.1 for limit in limits) <= 4


def test_one_shifted_column_among_several_decides(detector: EvidentlyDrift) -> None:
    names = ["prediction", "in.carrier", "in.hour"]
    drift = detector.compare(window(800, 1), window(800, 2, common=0.75), names, "jensenshannon")
    assert drift.p_value_max == 1 / 200
    assert [column.column for column in drift.columns if column.p_value < 0.02] == ["in.carrier"]


def test_missing_values_are_counted_and_not_dropped_silently(detector: EvidentlyDrift) -> None:
    column = detector.compare(window(600, 1), window(600, 2, missing=0.3), ["prediction"]).columns[0]
    assert column.missing_stable == 0.0
    assert 0.25 < column.missing_candidate < 0.35
    assert np.isfinite(column.statistic)
    gone = detector.compare(window(600, 1), window(600, 2, missing=1.1), ["prediction"]).columns[0]
    assert gone.missing_candidate == 1.0


def test_answers_that_were_errors_are_not_missing_predictions(detector: EvidentlyDrift) -> None:
    status = pa.array([500] * 100 + [200] * 500, pa.int16())
    broken = window(600, 2).set_column(0, "prediction", pa.array([None] * 100 + [0.2] * 250 + [0.3] * 250))
    drift = detector.compare(window(600, 1), broken.append_column("status", status), ["prediction"])
    assert drift.rows_candidate == 500
    assert drift.columns[0].missing_candidate == 0.0


def test_large_windows_are_thinned_evenly() -> None:
    with EvidentlyDrift(permutations=19, rows_max=1000, timeout_s=120.0) as detector:
        rows = pa.table({"prediction": np.arange(50_000.0)})
        drift = detector.compare(rows, rows, ["prediction"])
    assert (drift.rows_stable, drift.rows_candidate) == (1000, 1000)
    assert drift.columns[0].statistic == 0.0


def test_what_cannot_be_compared_says_why(detector: EvidentlyDrift) -> None:
    good, empty = window(600, 1), window(600, 1).slice(0, 0)
    with pytest.raises(BadInput, match="no column 'predicted'; they have prediction"):
        detector.compare(good, good, ["predicted"])
    with pytest.raises(BadInput, match=r"'in\.carrier' is text; compare it by psi"):
        detector.compare(good, good, ["in.carrier"], "wasserstein")
    with pytest.raises(BadInput, match="method 'best' is not known"):
        detector.compare(good, good, ["prediction"], "best")
    with pytest.raises(BadInput, match="neither numbers nor text"):
        detector.compare(*(pa.table({"prediction": [[1.0]] * 5}),) * 2, ["prediction"])
    with pytest.raises(NotThere, match="candidate's window has 0 rows"):
        detector.compare(good, empty, ["prediction"])
    nothing = window(600, 1, missing=1.1)
    with pytest.raises(PortError, match="nothing but missing values"):
        detector.compare(nothing, nothing, ["prediction"])


def test_with_a_name_a_comparison_is_fetched_by_a_later_call() -> None:
    """The rollout does not stand still while the worker starts and compares."""
    with EvidentlyDrift(permutations=19, wait_s=0.0, timeout_s=120.0) as detector:
        first, second = window(600, 1), window(600, 2)
        with pytest.raises(NotThere, match="being compared"):
            detector.compare(first, second, ["prediction"], of="a")
        with pytest.raises(NotThere, match="being compared"):
            detector.compare(first, second, ["prediction"], of="b")
        waited = detector.compare(first, second, ["prediction"])
        assert waited.rows_candidate == 600


def test_many_rollouts_share_one_worker_and_each_gets_its_own_answer() -> None:
    """A reconciler drives many at once, each in a thread; none may take another's place or answer."""
    shifts = (0.0, 0.1, 0.2, 0.3)

    def fetched(shift: float) -> float:
        deadline = time.monotonic() + 120.0
        while True:
            try:
                return detector.compare(
                    window(600, 1), window(600, 1, shift), ["prediction"], "ks", of=f"{shift}"
                ).columns[0].statistic  # fmt: skip
            except NotThere:
                assert time.monotonic() < deadline, "never told"
                time.sleep(0.05)

    with EvidentlyDrift(permutations=19, wait_s=0.0, timeout_s=120.0) as detector, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fetched, shifts))
    assert found == sorted(found)
    assert found[0] == 0.0
    assert len(set(found)) == len(shifts)


def test_a_worker_that_takes_too_long_is_ended_and_the_next_call_has_a_new_one() -> None:
    with EvidentlyDrift(permutations=19, timeout_s=0.0) as detector:
        with pytest.raises(PortError, match="no comparison after 0 s"):
            detector.compare(window(600, 1), window(600, 2), ["prediction"])
        detector._timeout_s = 120.0
        assert detector.compare(window(600, 1), window(600, 2), ["prediction"]).rows_stable == 600


def test_a_worker_that_dies_is_an_error_and_then_replaced(detector: EvidentlyDrift) -> None:
    detector.warm()
    assert detector._worker is not None
    detector._worker[0].kill()
    detector._worker[0].wait()
    assert detector.compare(window(600, 1), window(600, 2), ["prediction"]).rows_stable == 600


def test_evidentlys_report_is_one_html_file(detector: EvidentlyDrift, tmp_path: Path) -> None:
    path = detector.report_html(window(600, 1), window(600, 2, shift=0.1), tmp_path / "deep" / "drift.html")
    text = path.read_text()
    assert "prediction" in text
    assert "</html>" in text
    with pytest.raises(NotThere):
        detector.report_html(window(600, 1), window(600, 1).slice(0, 0), tmp_path / "none.html")


def test_importing_the_adapter_does_not_import_evidently() -> None:
    code = "import infra.drift_evidently, sys; sys.exit('evidently' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def batches(requests: int, rows: int, seed: int, shift: float = 0.0) -> pa.Table:
    """Requests of many rows, which resemble each other; every client sends the same id."""
    generator = np.random.default_rng(seed)
    of = np.repeat(np.arange(requests), rows)
    prediction = generator.normal(size=requests)[of] + generator.normal(size=of.size) + shift
    return pa.table({"request_id": ["mine"] * of.size, "time": of.astype(float), "prediction": prediction})


def test_requests_of_many_rows_are_no_more_different_than_chance_and_a_shift_is_found(
    detector: EvidentlyDrift,
) -> None:
    alike = [detector.compare(batches(40, 50, i), batches(40, 50, 99 + i), ["prediction"]) for i in range(20)]
    assert sum(drift.p_value_max <= 0.02 for drift in alike) <= 3
    shifted = detector.compare(batches(40, 50, 1), batches(40, 50, 2, shift=2.0), ["prediction"])
    assert shifted.p_value_max == 1 / 200
    assert (shifted.rows_stable, shifted.requests_stable, shifted.requests_candidate) == (2000, 40, 40)


def test_large_windows_are_thinned_by_whole_requests() -> None:
    with EvidentlyDrift(permutations=19, rows_max=1000, timeout_s=120.0) as detector:
        drift = detector.compare(batches(400, 10, 1), batches(5000, 1, 2), ["prediction"])
    assert (drift.rows_stable, drift.requests_stable) == (1000, 100)
    assert (drift.rows_candidate, drift.requests_candidate) == (1000, None)


def test_a_comparison_tells_up_to_when_both_windows_have_rows(detector: EvidentlyDrift) -> None:
    assert detector.compare(batches(50, 2, 1), batches(40, 2, 2), ["prediction"]).newest == 39.0
    assert detector.compare(window(600, 1), window(600, 2), ["prediction"]).newest is None


@pytest.mark.parametrize("method", ["wasserstein", "psi"])
def test_a_column_that_neither_window_has_values_of_keeps_no_other_from_being_compared(
    detector: EvidentlyDrift, method: str
) -> None:
    first, second = (
        window(600, i, shift).append_column("promo", pa.nulls(600, pa.float64())) for i, shift in ((1, 0.0), (2, 0.2))
    )
    empty, moved = detector.compare(first, second, ["promo", "prediction"], method).columns
    assert (empty.statistic, empty.high, empty.p_value) == (0.0, 0.0, 1.0)
    assert (empty.missing_stable, empty.missing_candidate) == (1.0, 1.0)
    assert moved.p_value == 1 / 200
