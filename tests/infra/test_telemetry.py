"""What the drift gate gets from sampled rows: none yet is no evidence, rows that cannot be compared are an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from flows.wiring import SystemClock
from infra.drift_evidently import EvidentlyDrift
from infra.samples_arrow import SampledRows
from infra.telemetry import LiveTelemetry
from policies import shifts
from policies.evidence import Drift, Pairs
from tasks.ports import BadInput, NotThere, PortError

CLOCK = SystemClock()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take long to read; each test waits for it."""
    monkeypatch.setattr("infra.telemetry._READ_S", 60.0)


def sampled(home: Path, version: str, rows: int = 10, prediction: float = 0.1) -> None:
    answered(home, version, [(str(i), float(i), prediction) for i in range(rows)])


def answered(home: Path, version: str, rows: list[tuple[str, float, float]]) -> None:
    """The version's sampled rows, as (request id, time, prediction)."""
    folder = home / "samples" / "m" / version
    folder.mkdir(parents=True)
    ids, times, predictions = zip(*rows, strict=True)
    values = {
        "request_id": ids,
        "row": pa.array([0] * len(rows), pa.int32()),
        "time": times,
        "in.carrier": ["AA"] * len(rows),
        "prediction": predictions,
        "status": pa.array([200] * len(rows), pa.int16()),
    }
    table = pa.table(values)
    with pa.OSFile(str(folder / "1.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def test_no_rows_yet_is_no_evidence(tmp_path: Path) -> None:
    sampled(tmp_path, "1")
    with pytest.raises(NotThere, match="m v2 has no sampled rows yet"):
        LiveTelemetry(tmp_path, EvidentlyDrift(), CLOCK).drift("m", "1", "2", ["prediction"], "wasserstein", 0.0)


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
        LiveTelemetry(tmp_path, EvidentlyDrift(), CLOCK).drift("m", "1", "2", [column], method, 0.0)


class Windows(EvidentlyDrift):
    """Keeps the times of the rows that it is asked to compare, and compares nothing."""

    def compare(self, reference: pa.Table, current: pa.Table, *_: Any, **__: Any) -> Drift:
        self.times = [np.asarray(table["time"]) for table in (reference, current)]
        return Drift(reference.num_rows, current.num_rows, (), 1.0)


Times = list[float]
HOUR = 3600.0
TRAFFIC: dict[str, tuple[Times, Times]] = {
    "one share": (list(np.arange(0, HOUR, 0.2)), list(np.arange(0, HOUR, 4.0))),
    "shadow, then canary": (
        list(np.arange(0, HOUR, 0.2)),
        [*np.arange(0, 600, 0.2), *np.arange(600, HOUR, 4.0)],
    ),
    "a quiet night, then a rush": (
        [*np.arange(0, HOUR, 10.0), *np.arange(HOUR, HOUR + 60, 0.01)],
        [*np.arange(0, HOUR, 20.0), *np.arange(HOUR, HOUR + 60, 0.2)],
    ),
    "halves": (list(np.arange(0, HOUR, 0.5)), list(np.arange(0.25, HOUR, 0.5))),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_the_windows_are_of_the_same_times_however_the_traffic_was_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traffic: str, swapped: bool
) -> None:
    """Else the distance is that of a world that has moved meanwhile. And few requests to one version do not leave it
    without rows, nor does a rush leave out the other one's."""
    monkeypatch.setattr(shifts, "WINDOW_ROWS", 2000)
    many, few = TRAFFIC[traffic]
    for version, times in (("1", few if swapped else many), ("2", many if swapped else few)):
        answered(tmp_path, version, [(str(i), float(at), 0.5) for i, at in enumerate(times)])
    windows = Windows()
    LiveTelemetry(tmp_path, windows, CLOCK).drift("m", "1", "2", ["prediction"], "wasserstein", 0.0)
    first, second = windows.times
    assert min(len(first), len(second)) >= 0.6 * min(len(few), 2000)
    assert scipy.stats.ks_2samp(first, second).statistic < 0.06


def test_what_the_servers_have_deleted_of_one_version_is_not_compared_with_the_other(tmp_path: Path) -> None:
    answered(tmp_path, "1", [(str(i), float(i), 0.5) for i in range(60, 100)])
    answered(tmp_path, "2", [(str(i), float(i), 0.5) for i in range(100)])
    windows = Windows()
    LiveTelemetry(tmp_path, windows, CLOCK).drift("m", "1", "2", ["prediction"], "wasserstein", 0.0)
    assert [times.min() for times in windows.times] == [60.0, 60.0]


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (lambda live: live.drift("m", "1", "2", ["prediction"], "wasserstein", 0.0).rows_stable, 10),
        (lambda live: live.pairs("m", "1", "2", 0.1, -1.0), Pairs(10, 10)),
        (lambda live: live.outcomes("m", "1", "2", "brier", -1.0, 1e12).waiting, 10),
    ],
    ids=["drift", "pairs", "outcomes"],
)
def test_reading_the_rows_keeps_no_look_waiting_and_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[LiveTelemetry], Any], found: Any
) -> None:
    """Whoever looks renews the lease, too."""
    sampled(tmp_path, "1")
    sampled(tmp_path, "2", prediction=0.3)
    monkeypatch.setattr("infra.telemetry._READ_S", 0.0)
    may_read, asked, read = threading.Event(), [], SampledRows.read

    def slow(rows: SampledRows, model: str, version: str, *more: Any) -> pa.Table:
        asked.append(version)
        may_read.wait(60)
        return read(rows, model, version, *more)

    monkeypatch.setattr(SampledRows, "read", slow)
    telemetry = LiveTelemetry(tmp_path, Windows(), CLOCK)
    for _ in range(3):
        with pytest.raises(NotThere, match="being read"):
            ask(telemetry)
    monkeypatch.setattr("infra.telemetry._READ_S", 60.0)
    may_read.set()
    assert ask(telemetry) == found
    assert asked == ["1", "2"]


def test_rows_that_nobody_fetches_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout ended while they were read, and its process drives others for days."""
    sampled(tmp_path, "1")
    sampled(tmp_path, "2")
    telemetry = LiveTelemetry(tmp_path, Windows(), CLOCK)
    monkeypatch.setattr("infra.telemetry._READ_S", 0.0)
    monkeypatch.setattr("infra.telemetry._OVER_S", 0.0)
    with pytest.raises(NotThere, match="being read"):
        telemetry.pairs("m", "1", "2", 0.1, -1.0)
    ((left, _),) = telemetry._reading.values()
    left.result(60.0)
    with pytest.raises(NotThere, match="being read"):
        telemetry.pairs("m", "1", "2", 0.1, 7.5)
    assert left not in [reading for reading, _ in telemetry._reading.values()]


@pytest.mark.parametrize("error", [TimeoutError("no answer"), PortError("no answer")])
def test_rows_that_cannot_be_read_are_said_and_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sampled(tmp_path, "1")
    sampled(tmp_path, "2")
    telemetry = LiveTelemetry(tmp_path, Windows(), CLOCK)
    with monkeypatch.context() as broken:
        broken.setattr(SampledRows, "read", lambda *_: throw(error))
        with pytest.raises(type(error), match="no answer"):
            telemetry.pairs("m", "1", "2", 0.1, -1.0)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", lambda _: throw(RuntimeError("can't start new thread")))
        with pytest.raises(PortError, match="nothing can be done beside the looks: can't start new thread"):
            telemetry.pairs("m", "1", "2", 0.1, -1.0)
    assert telemetry.pairs("m", "1", "2", 0.1, -1.0) == Pairs(10, 0)


def throw(error: Exception) -> None:
    raise error


def test_while_a_comparison_is_under_way_no_rows_are_read(tmp_path: Path) -> None:
    class Busy(EvidentlyDrift):
        def under_way(self, *_: object) -> bool:
            return True

        def compare(self, *windows: Any, **__: Any) -> Drift:
            return Drift(windows[0].num_rows, windows[1].num_rows, (), 1.0)

    assert LiveTelemetry(tmp_path, Busy(), CLOCK).drift("m", "1", "2", ["prediction"], "ks", 0.0).rows_stable == 0


def test_pairs_of_another_rollout_or_by_another_tolerance_are_counted_anew(tmp_path: Path) -> None:
    """One process drives many rollouts, and the same two versions may meet again."""
    sampled(tmp_path, "1")
    sampled(tmp_path, "2", prediction=0.3)
    telemetry = LiveTelemetry(tmp_path, EvidentlyDrift(), CLOCK)
    assert telemetry.pairs("m", "1", "2", 0.1, -1.0) == Pairs(10, 10)
    assert telemetry.pairs("m", "1", "2", 0.1, 7.5) == Pairs(2, 2), "what came before it began is not its own"
    assert telemetry.pairs("m", "1", "2", 0.5, -1.0) == Pairs(10, 0)
    assert telemetry.pairs("m", "1", "2", 0.1, -1.0) == Pairs(10, 10), "nothing is counted twice"


def test_requests_that_share_an_id_are_no_pairs(tmp_path: Path) -> None:
    """Clients choose the ids: one that sends the same each time would pair each of its requests with all of them."""
    rows = [("mine" if i % 10 == 0 else str(i), float(i), i / 400) for i in range(400)]
    answered(tmp_path, "1", rows)
    answered(tmp_path, "2", rows)
    assert LiveTelemetry(tmp_path, EvidentlyDrift(), CLOCK).pairs("m", "1", "2", 0.001, -1.0) == Pairs(360, 0)


@pytest.mark.parametrize("other", [6.0, 1e12], ids=["before what is counted", "after it"])
@pytest.mark.parametrize("twice", ["1", "2"])
def test_an_id_that_is_used_again_outside_of_what_is_counted_is_no_pair(
    tmp_path: Path, twice: str, other: float
) -> None:
    """The other version may lack either request, and its answer to the other one is no answer to this one."""
    for version in ("1", "2"):
        again = [("mine", other, 0.9)] if version == twice else []
        answered(tmp_path, version, [("mine", 8.0, 0.1), ("x", 8.5, 0.2), *again])
    assert LiveTelemetry(tmp_path, EvidentlyDrift(), CLOCK).pairs("m", "1", "2", 0.1, 7.5) == Pairs(1, 0)


def test_of_the_version_with_more_traffic_whole_requests_are_left_out(tmp_path: Path) -> None:
    """Else the requests of the two windows are not alike: the one's have more rows."""
    answered(tmp_path, "1", [(str(i // 5), float(i // 5), 0.5) for i in range(20_000)])
    answered(tmp_path, "2", [(str(i // 5), 2000.0 + i // 5, 0.5) for i in range(1000)])
    windows = Windows()
    LiveTelemetry(tmp_path, windows, CLOCK).drift("m", "1", "2", ["prediction"], "wasserstein", 0.0)
    for times in windows.times:
        assert 100 <= len(np.unique(times)) < 4000
        assert set(np.unique(times, return_counts=True)[1]) == {5}
