"""Labels by request id: stored once, the later one wins, the amount is bounded; and joined with sampled answers."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.wiring import SystemClock
from infra import labels_arrow, outcomes_arrow
from infra.drift_evidently import EvidentlyDrift
from infra.labels_arrow import LabelStore
from infra.outcomes_arrow import LabelledAnswers
from infra.telemetry import LiveTelemetry
from policies.evidence import Outcomes, Sums
from tasks.ports import BadInput, PortError
from tests.ports.outcomes_contract import OutcomesContract, Served

CLOCK = SystemClock()
SINCE = 1_000.0


def csv(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text)
    return path


def stored(home: Path, after: int = 0) -> list[tuple[str, int, float]]:
    found = []
    for _, table in LabelStore(home).after("flights", after):
        found += list(zip(*(table[name].to_pylist() for name in ("request_id", "row", "label")), strict=True))
    return found


def answered(
    home: Path,
    version: str,
    name: str,
    rows: list[tuple[str, int, float, float]],
    status: int = 200,
    model: str = "flights",
) -> None:
    """Sampled rows as (request id, row, prediction, time)."""
    folder = home / "samples" / model / version
    folder.mkdir(parents=True, exist_ok=True)
    ids, numbers, predictions, times = zip(*rows, strict=True)
    table = pa.table(
        {
            "request_id": list(ids),
            "row": pa.array(numbers, pa.int32()),
            "time": list(times),
            "prediction": list(predictions),
            "status": pa.array([status] * len(rows), pa.int16()),
        }
    )
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def ask(reader: LabelledAnswers, metric: str = "accuracy", wait: float = 1e10) -> Outcomes:
    return reader.outcomes("flights", "1", "2", metric, SINCE, wait)


# ---------------------------------------------------------------- the store


def test_csv_and_parquet_are_taken_and_ids_of_digits_stay_text(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    assert store.add("flights", csv(tmp_path, "request_id,label\n007,1\nb,0\n")) == 2
    pq.write_table(pa.table({"request_id": ["c"], "row": [3], "label": [True]}), tmp_path / "l.parquet")
    assert store.add("flights", tmp_path / "l.parquet") == 1
    assert stored(tmp_path) == [("007", 0, 1.0), ("b", 0, 0.0), ("c", 3, 1.0)]
    assert stored(tmp_path, after=1) == [("c", 3, 1.0)]


def test_within_a_file_the_later_label_of_a_row_wins(tmp_path: Path) -> None:
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,row,label\na,0,1\na,1,1\na,0,0\n"))
    assert sorted(stored(tmp_path)) == [("a", 0, 0.0), ("a", 1, 1.0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,label\na,1\n", "no column 'request_id'"),
        ("request_id,lable\na,1\n", "did you mean 'lable'"),
        ("request_id,label\na,2\n", "'label' holds 2"),
        ("request_id,label\na,1\nb,\n", "'label' holds nan"),
        ("request_id,label\n,1\n", "'request_id' is empty"),
        ("request_id,row,label\na,0.5,1\n", "whole numbers"),
        ("request_id,row,label\na,-1,1\n", "whole numbers"),
        ("request_id,row,label\na,inf,1\n", "whole numbers"),
        ("request_id,row,label\na,nan,1\n", "whole numbers"),
        ("request_id,row,label\na,3000000000,1\n", "whole numbers from 0 to 2147483647"),
        ("request_id,label,label\na,1,1\n", "more than one column 'label'"),
        ("request_id,request_id,label\na,a,1\n", "more than one column 'request_id'"),
        ("request_id,row,row,label\na,0,0,1\n", "more than one column 'row'"),
        ("request_id,label\n", "no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_and_nothing_of_it_is_stored(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        LabelStore(tmp_path).add("flights", csv(tmp_path, text))
    assert stored(tmp_path) == []


def test_request_ids_that_are_no_text_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"request_id": [["a"]], "label": [1.0]}), tmp_path / "l.parquet")
    with pytest.raises(BadInput, match="'request_id' is no text"):
        LabelStore(tmp_path).add("flights", tmp_path / "l.parquet")


def test_the_oldest_labels_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_arrow, "ROWS_MAX", 5)
    for name in "abcd":
        LabelStore(tmp_path).add("flights", csv(tmp_path, f"request_id,label\n{name}1,1\n{name}2,0\n"))
    assert [each[0] for each in stored(tmp_path)] == ["c1", "c2", "d1", "d2"]


def test_bytes_that_are_no_arrow_file_are_named(tmp_path: Path) -> None:
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,label\na,1\n"))
    next((tmp_path / "labels").rglob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(PortError, match="cannot be read"):
        stored(tmp_path)


# ---------------------------------------------------------------- joined with the answers


def test_a_request_that_both_answered_is_a_pair_and_others_count_alone(tmp_path: Path) -> None:
    answered(tmp_path, "1", "a", [("x", 0, 0.9, 1001), ("y", 0, 0.2, 1001), ("s", 0, 0.4, 1001)])
    answered(tmp_path, "2", "a", [("x", 0, 0.1, 1001), ("y", 0, 0.3, 1002), ("c", 0, 0.8, 1002), ("z", 0, 0.5, 1003)])
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,label\nx,1\ny,0\ns,1\nc,1\nunknown,1\n"))
    seen = ask(LabelledAnswers(tmp_path))
    assert seen.pairs == Sums(2, 1.0, 1.0)
    assert seen.stable == Sums(1, 1.0, 1.0)
    assert seen.candidate == Sums(1, 0.0, 0.0)
    assert seen.waiting == 1


def test_labels_that_come_later_are_added_and_never_counted_twice(tmp_path: Path) -> None:
    answered(tmp_path, "1", "a", [("x", 0, 0.9, 1001), ("y", 0, 0.9, 1001)])
    answered(tmp_path, "2", "a", [("x", 0, 0.9, 1001), ("y", 0, 0.1, 1001)])
    reader, store = LabelledAnswers(tmp_path), LabelStore(tmp_path)
    assert ask(reader).waiting == 2
    store.add("flights", csv(tmp_path, "request_id,label\nx,1\n"))
    assert ask(reader).pairs.n == 1
    store.add("flights", csv(tmp_path, "request_id,label\nx,0\ny,1\n"))  # a correction comes too late
    assert ask(reader).pairs == Sums(2, 1.0, 1.0)
    assert ask(reader).waiting == 0


def test_of_several_labels_that_came_before_the_count_the_last_one_wins(tmp_path: Path) -> None:
    answered(tmp_path, "2", "a", [("x", 0, 0.9, 1001)])
    for label in (1, 0):
        LabelStore(tmp_path).add("flights", csv(tmp_path, f"request_id,label\nx,{label}\n"))
    assert ask(LabelledAnswers(tmp_path)).candidate.total == 1.0


def test_rows_of_one_request_are_one_observation(tmp_path: Path) -> None:
    answered(tmp_path, "2", "a", [("x", row, 0.9 if row else 0.1, 1001) for row in range(4)])
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,row,label\nx,0,1\nx,1,1\nx,2,1\nx,3,1\n"))
    assert ask(LabelledAnswers(tmp_path)).candidate == Sums(1, 0.25, 0.0625)


def test_a_prediction_that_is_no_number_is_as_wrong_as_can_be(tmp_path: Path) -> None:
    answered(tmp_path, "2", "a", [("x", 0, float("nan"), 1001), ("y", 0, 0.5, 1001)])
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,label\nx,1\ny,1\n"))
    assert ask(LabelledAnswers(tmp_path), "brier").candidate.total == 1.25


def test_answers_from_before_and_failed_requests_do_not_count(tmp_path: Path) -> None:
    answered(tmp_path, "2", "a", [("x", 0, 0.9, 999.0)])
    answered(tmp_path, "2", "b", [("y", 0, 0.9, 1001)], status=503)
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,label\nx,1\ny,1\n"))
    assert ask(LabelledAnswers(tmp_path)).candidate.n == 0


def test_a_label_that_comes_later_than_the_policy_waits_is_ignored(tmp_path: Path) -> None:
    now = time.time()
    answered(tmp_path, "2", "a", [("old", 0, 0.9, now - 100.0), ("new", 0, 0.9, now - 10.0)])
    reader = LabelledAnswers(tmp_path)
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,label\nold,1\nnew,1\n"))
    assert ask(reader, wait=50.0).candidate.n == 1
    assert ask(reader, wait=50.0).waiting == 0


def test_what_waits_for_labels_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes_arrow, "ROWS_MAX", 10)
    answered(tmp_path, "2", "a", [(f"r{i}", 0, 0.9, 1001.0 + i) for i in range(50)])
    assert ask(LabelledAnswers(tmp_path)).waiting == 10


def test_what_one_rollout_has_counted_stays_while_another_asks(tmp_path: Path) -> None:
    """The servers delete the oldest rows meanwhile. Who has not asked for long has ended, and is forgotten."""
    answered(tmp_path, "2", "a", [("x", 0, 0.9, 1001.0)])
    LabelStore(tmp_path).add("flights", csv(tmp_path, "request_id,label\nx,1\n"))
    reader = LabelledAnswers(tmp_path)
    assert ask(reader).candidate.n == 1
    reader.outcomes("another", "1", "2", "accuracy", SINCE, 1e10)
    shutil.rmtree(tmp_path / "samples")
    assert ask(reader).candidate.n == 1
    for counted in reader._counted.values():
        counted.asked -= 3600.0
    reader.outcomes("another", "1", "2", "accuracy", SINCE, 1e10)
    assert [key[0] for key in reader._counted] == ["another"]


class TestLocalOutcomes(OutcomesContract):
    """The local target's telemetry keeps the contract."""

    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
        monkeypatch.setattr("infra.telemetry._READ_S", 60.0)  # a busy machine may take long to read

        def serve(stable: float, candidate: float, labelled: float) -> LiveTelemetry:
            for version, wrong in (("1", stable), ("2", candidate)):
                rows = [(f"r{i}", 0, 0.2 if i < 1000 * wrong else 0.8, 1001.0) for i in range(1000)]
                answered(tmp_path, version, "a", rows, model="m")
            text = "\n".join(f"r{i},1" for i in range(int(1000 * labelled)))
            LabelStore(tmp_path).add("m", csv(tmp_path, f"request_id,label\n{text}\n"))
            return LiveTelemetry(tmp_path, EvidentlyDrift(), CLOCK)

        return serve
