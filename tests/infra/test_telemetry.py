"""What the drift gate gets from sampled rows: none yet is no evidence, rows that cannot be compared are an error."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from infra.drift_evidently import EvidentlyDrift
from infra.telemetry import LiveTelemetry
from policies.evidence import Pairs
from tasks.ports import BadInput, NotThere


def sampled(home: Path, version: str, rows: int = 10, prediction: float = 0.1) -> None:
    folder = home / "samples" / "m" / version
    folder.mkdir(parents=True)
    values = {
        "request_id": [str(i) for i in range(rows)],
        "row": pa.array([0] * rows, pa.int32()),
        "time": [float(i) for i in range(rows)],
        "in.carrier": ["AA"] * rows,
        "prediction": [prediction] * rows,
        "status": pa.array([200] * rows, pa.int16()),
    }
    table = pa.table(values)
    with pa.OSFile(str(folder / "1.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def test_no_rows_yet_is_no_evidence(tmp_path: Path) -> None:
    sampled(tmp_path, "1")
    with pytest.raises(NotThere, match="m v2 has no sampled rows yet"):
        LiveTelemetry(tmp_path, EvidentlyDrift()).drift("m", "1", "2", ["prediction"], "wasserstein", 0.0)


@pytest.mark.parametrize(
    ("column", "method", "says"),
    [
        ("carier", "psi", r"no column 'in\.carier'; they have .*in\.carrier"),
        ("carrier", "wasserstein", r"'in\.carrier' is text; compare it by psi"),
    ],
)
def test_a_column_that_is_not_there_or_of_another_kind_is_an_error(
    tmp_path: Path, column: str, method: str, says: str
) -> None:
    """Waiting would not mend it; and it is found before Evidently is asked, which would only raise."""
    sampled(tmp_path, "1")
    sampled(tmp_path, "2")
    with pytest.raises(BadInput, match=says):
        LiveTelemetry(tmp_path, EvidentlyDrift()).drift("m", "1", "2", [column], method, 0.0)


def test_pairs_of_another_rollout_or_by_another_tolerance_are_counted_anew(tmp_path: Path) -> None:
    """One process drives many rollouts, and the same two versions may meet again."""
    sampled(tmp_path, "1")
    sampled(tmp_path, "2", prediction=0.3)
    telemetry = LiveTelemetry(tmp_path, EvidentlyDrift())
    assert telemetry.pairs("m", "1", "2", 0.1, -1.0) == Pairs(10, 10)
    assert telemetry.pairs("m", "1", "2", 0.1, 7.5) == Pairs(2, 2), "what came before it began is not its own"
    assert telemetry.pairs("m", "1", "2", 0.5, -1.0) == Pairs(10, 0)
    assert telemetry.pairs("m", "1", "2", 0.1, -1.0) == Pairs(10, 10), "nothing is counted twice"
