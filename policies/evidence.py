"""What a look at a running rollout brings back: counters per version, and comparisons of sampled rows.

Counters are cumulative and mergeable by sum over replicas; their cost does not grow with the traffic.
All values here are JSON-able, so that the ledger can keep them and any decision can be recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Log-spaced upper edges from 0.1 ms to 36 s, 12 % apart: fine enough to resolve a 1.2x change of a quantile.
LATENCY_EDGES_MS: tuple[float, ...] = tuple(round(0.1 * 1.12**i, 4) for i in range(114))
# Upper edges of the prediction histogram for scores in [0, 1]; anything beyond falls into the last bucket.
SCORE_EDGES: tuple[float, ...] = tuple(round(i / 20, 2) for i in range(1, 20))
# Rows of each version that a detector compares, evenly thinned; Wasserstein's distances take the least time by far.
_ROWS_MAX, _ROWS_MAX_WASSERSTEIN = 4_000, 20_000
MONITOR_ROWS_MAX = 8_000  # of a period, and of the reference: 4,000 a half


def rows_max(method: str) -> int:
    """How many rows of each version are compared by the method, at most."""
    return _ROWS_MAX_WASSERSTEIN if method == "wasserstein" else _ROWS_MAX


@dataclass(frozen=True)
class Counts:
    """Cumulative counters of one version over its replicas.

    `requests` that were answered or failed, `errors` among them (5xx, reset, timed out, not connected),
    `latency` counts per bucket of `LATENCY_EDGES_MS` (one more than edges: the last is beyond them),
    `scores` counts per bucket of `SCORE_EDGES` (one more than edges).
    `epoch` names the processes that counted; a change of it means that the counters began anew.
    """

    requests: int
    errors: int
    latency: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    epoch: str = ""


@dataclass(frozen=True)
class ColumnDrift:
    """One column compared between two concurrent windows.

    `statistic` is the named `method`'s distance, `p_value` that of the permutation test for the same statistic,
    `missing_stable` and `missing_candidate` the shares of missing or non-finite values. `high` is an upper limit of the
    distance (99 %). `error` is the distance's standard error, `bias` how much too large windows of this size make it.
    None where the detector gives none.
    """

    column: str
    method: str
    statistic: float
    p_value: float
    missing_stable: float = 0.0
    missing_candidate: float = 0.0
    high: float | None = None
    error: float | None = None
    bias: float = 0.0


@dataclass(frozen=True)
class Drift:
    """Two concurrent windows of sampled rows compared, `rows_*` rows each, by the drift detector.

    `p_value_least` is the smallest that the permutation test could have come to: one in so many permutations.
    `requests_*`: of how many requests the rows are, counted as less where few have most of the rows; None: each row is
    its own. Both windows have rows up to the POSIX time `newest`, if that is known.
    """

    rows_stable: int
    rows_candidate: int
    columns: tuple[ColumnDrift, ...]
    p_value_max: float  # of the maximum over the columns under permutation; one number for one decision
    p_value_least: float = 0.0
    requests_stable: int | None = None
    requests_candidate: int | None = None
    newest: float | None = None


@dataclass(frozen=True)
class Pairs:
    """The same requests answered by both versions (shadow): how many pairs, and how many answers differed."""

    compared: int
    differing: int


@dataclass(frozen=True)
class Sums:
    """Observations added up: how many, their sum, the sum of their squares. For one rollout, plain numbers."""

    n: Any = 0.0
    total: Any = 0.0
    squares: Any = 0.0

    @property
    def mean(self) -> float:
        return float(self.total / self.n) if self.n else 0.0

    def plus(self, more: Sums) -> Sums:
        return Sums(self.n + more.n, self.total + more.total, self.squares + more.squares)

    def minus(self, before: Sums) -> Sums:
        return Sums(self.n - before.n, self.total - before.total, self.squares - before.squares)

    def where(self, kept: Any) -> Sums:
        """These observations where `kept` holds, none elsewhere."""
        return Sums(self.n * kept, self.total * kept, self.squares * kept)

    def plain(self) -> Sums:
        return Sums(float(self.n), float(self.total), float(self.squares))


NONE = Sums()


@dataclass(frozen=True)
class Outcomes:
    """Labelled answers since the POSIX time `since`: losses from 0 (right) to 1 (wrong), one per request.

    `pairs` are differences (candidate's loss less the stable version's) on requests that both answered, `candidate`
    and `stable` losses on requests that one of them answered. `waiting` of the candidate's answers have no label yet.
    """

    since: float
    pairs: Sums = NONE
    candidate: Sums = NONE
    stable: Sums = NONE
    waiting: int = 0

    def minus(self, before: Outcomes) -> Outcomes:
        """What came after `before`, counted since the same time."""
        return Outcomes(
            self.since, self.pairs.minus(before.pairs), self.candidate.minus(before.candidate),
            self.stable.minus(before.stable), self.waiting,
        )  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """One look. `None` means that the source could not be read, and `problems` says why, by source name."""

    at: float
    stable: Counts | None
    candidate: Counts | None
    drift: Drift | None = None
    pairs: Pairs | None = None
    problems: dict[str, str] = field(default_factory=dict)
    outcomes: Outcomes | None = None
