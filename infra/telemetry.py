"""Telemetry of the local target: the gateway's and the servers' counters, and the rows that the servers sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infra.drift_evidently import EvidentlyDrift
from infra.outcomes_arrow import LabelledAnswers
from infra.samples_arrow import SampledRows, requests_of
from infra.telemetry_envoy import EnvoyCounts
from policies import shifts
from policies.evidence import Counts, Drift, Outcomes, Pairs
from tasks.ports import Clock, NotThere

if TYPE_CHECKING:
    import pyarrow as pa

_SETTLE_S = 3.0  # segments are written every second, and a copy may be answered after the original
_READ_S = 1.0  # of a look
_OVER_S = 600.0  # a rollout that has not asked for so long has ended
_SEGMENTS_MAX = 2_000  # that are opened for the rows beside those of a version that answers less
T = TypeVar("T")
_OWN = ("prediction", "status", "row")
_KEY = ["request_id", "row"]


@dataclass
class _Counted:
    """Pairs counted so far, for stable requests answered up to `until`."""

    until: float
    compared: int = 0
    differing: int = 0


class LiveTelemetry:
    """Reads one agent's data plane. Several rollouts may ask, each from a thread of its own."""

    def __init__(self, agent_home: Path, drift: EvidentlyDrift, clock: Clock) -> None:
        self._clock = clock
        self._counts = EnvoyCounts(agent_home)
        self._samples = SampledRows(agent_home)
        self._labelled = LabelledAnswers(agent_home)
        self._drift = drift
        self._pairs: dict[tuple[str, str, str, float, float], _Counted] = {}
        self._reading: dict[str, tuple[Future[Any], float]] = {}  # with when it was last asked for

    def warm(self) -> None:
        self._drift.warm()

    def counts(self, model: str, version: str, shadow: bool) -> Counts:
        return self._counts.counts(model, version, "shadow" if shadow else "live")

    def drift(
        self, model: str, stable: str, candidate: str, columns: Sequence[str], method: str, since: float
    ) -> Drift:
        import pyarrow as pa

        names = tuple(name if name in _OWN else f"in.{name}" for name in columns)
        of = f"{model} {stable} {candidate} {since}"  # a comparison takes longer than a look: a later one fetches it
        tables = [pa.table({})] * 2
        if not self._drift.under_way(of, names, method):
            tables = self._aside(of, lambda: self._windows(model, (stable, candidate), since))
        return self._drift.compare(tables[0], tables[1], names, method, of)

    def _aside(self, of: str, read: Callable[[], T]) -> T:
        """What `read` gives, or raises. While it takes longer than a look may, NotThere: a later look fetches it.

        Hours of little traffic are tens of thousands of segments, and whoever looks renews the lease, too.
        """
        now = time.monotonic()
        for each, (made, asked) in list(self._reading.items()):
            if made.done() and asked < now - _OVER_S:
                self._reading.pop(each, None)
        reading: Future[T] = self._reading[of][0] if of in self._reading else self._clock.beside(read)
        self._reading[of] = reading, now
        futures.wait([reading], _READ_S)
        if not reading.done():
            raise NotThere("the sampled rows are being read")
        self._reading.pop(of, None)
        return reading.result()

    def _windows(self, model: str, versions: Sequence[str], since: float) -> list[pa.Table]:
        """The newest rows of both versions, of the same times: the world may move, and their shares of the traffic
        differ. Where one answers so much more that its newest rows are of a shorter time, more of them are read."""
        import pyarrow as pa

        tables = [self._rows(model, version, since, shifts.WINDOW_ROWS) for version in versions]
        begun = min(_first(table) for table in tables)
        for index, version in enumerate(versions):
            if tables[index].num_rows == shifts.WINDOW_ROWS and begun < _first(tables[index]):
                tables[index] = self._rows(model, version, begun, 10 * shifts.WINDOW_ROWS, _SEGMENTS_MAX)
        times, requests = [table["time"].to_numpy() for table in tables], [requests_of(table) for table in tables]
        chosen = shifts.together(times, requests)
        return [table.take(pa.array(rows)) for table, rows in zip(tables, chosen, strict=True)]

    def _rows(self, model: str, version: str, since: float, *limits: int) -> pa.Table:
        """The rows that `SampledRows.read` finds. Raises NotThere where there is none."""
        table = self._samples.read(model, version, since, *limits)
        if table.num_rows == 0:
            raise NotThere(f"{model} v{version} has no sampled rows yet")
        return table

    def pairs(self, model: str, stable: str, candidate: str, tolerance: float, since: float) -> Pairs:
        key = (model, stable, candidate, tolerance, since)
        return self._aside(f"pairs {key}", lambda: self._paired(*key))

    def _paired(self, model: str, stable: str, candidate: str, tolerance: float, since: float) -> Pairs:
        counted = self._pairs.setdefault((model, stable, candidate, tolerance, since), _Counted(since))
        until = time.time() - _SETTLE_S
        if until > counted.until:
            first, second = (
                self._samples.read(model, version, counted.until - _SETTLE_S) for version in (stable, candidate)
            )
            compared, differing = _compare(first, second, counted.until, until, tolerance)
            counted.compared += compared
            counted.differing += differing
            counted.until = until
        return Pairs(counted.compared, counted.differing)

    def outcomes(self, model: str, stable: str, candidate: str, metric: str, since: float, wait: float) -> Outcomes:
        key = (model, stable, candidate, metric, since, wait)
        return self._aside(f"outcomes {key}", lambda: self._labelled.outcomes(*key))


def _first(table: pa.Table) -> float:
    return float(table["time"][0].as_py())


def _compare(first: pa.Table, second: pa.Table, after: float, until: float, tolerance: float) -> tuple[int, int]:
    """Rows of `first` answered in (after, until] that `second` has too, and how many of them have another answer."""
    import pyarrow.compute as pc

    if first.num_rows == 0 or second.num_rows == 0:
        return 0, 0
    mine = _lone(first)
    mine = mine.filter(pc.and_(pc.greater(mine["time_one"], after), pc.less_equal(mine["time_one"], until)))
    both = mine.join(_lone(second), _KEY, join_type="inner", right_suffix="_second")
    apart = pc.abs(pc.subtract(both["prediction_one"], both["prediction_one_second"]))
    differing = pc.sum(pc.cast(pc.invert(pc.less_equal(apart, tolerance)), "int64")).as_py() or 0  # NaN differs
    return both.num_rows, int(differing)


def _lone(table: pa.Table) -> pa.Table:
    """Time and prediction (`time_one`, `prediction_one`) of the rows whose key no other row has.

    Clients choose the ids of their requests. Which answers belong together cannot be told where one id stands twice.
    """
    import pyarrow.compute as pc

    found = table.group_by(_KEY).aggregate([("time", "one"), ("prediction", "one"), ([], "count_all")])
    return found.filter(pc.equal(found["count_all"], 1)).drop_columns(["count_all"])
