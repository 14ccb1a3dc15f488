"""What the sampled rows say: do the two versions' predictions differ, and how often on the very same requests?

The drift detector's comparison is a test for one look. Its share of the error budget is therefore split over a fixed
number of looks, three in each stage; on further looks it may pass, but raise no alarm.

A distance up to the threshold is tolerated, so an alarm needs a lower limit of the distance beyond it: whoever stands
exactly at the threshold is rolled back as rarely as the look's share says. That limit is an approximation; that equal
windows raise no alarm, however odd their values, is also kept by the permutation test, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from policies import faults, stats
from policies.evidence import ColumnDrift, Drift, Pairs
from policies.policy import Disagreement, Drifting
from policies.verdict import GateReport, Verdict

LOOKS = (0.0, 0.5, 1.0)  # the shares of a stage's length after which a comparison may raise an alarm
EVERY_S = 4.0  # between two comparisons
WINDOW_ROWS = 22_000  # newest rows of each version; some more than are compared: answers that were errors are left out
_BINS_MAX, _BIN_ROWS = 100, 40  # bins of time in which windows are made alike, and rows that each should have
RESAMPLES = 100  # of the windows, from which a detector takes the standard error of a distance
REQUESTS_MIN = 30  # of each version: rows of fewer say little of the next one, however many they are
_MISSING_PART = 0.1  # of each look's alpha: that values are missing is seen at once, by an exact test
MISSING_MARGIN = 0.01  # so many more missing values are tolerated
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Shift:
    """The comparisons of this stage: how many could raise an alarm, why one did (nothing if empty), and the newest."""

    spent: int = 0
    alarm: str = ""
    seen: Drift | None = None


@dataclass(frozen=True)
class Paired:
    """Pairs compared since the start of the rollout; `last_*` is the source's count at the last look."""

    compared: float = 0.0
    differing: float = 0.0
    in_stage: float = 0.0
    last_compared: float = 0.0
    last_differing: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Where the rollout stands: seconds in the stage, its length, the stages that share `alpha`, and how much wider
    than the final margin the stage's is. `began` is the stage's first look (POSIX seconds); None where one version gets
    no request in it, so that only rows from before can be compared."""

    elapsed_s: float
    length_s: float
    stages: int
    factor: float
    alpha: float
    began: float | None = None

    @property
    def alpha_look(self) -> float:
        """The chance of a false alarm that one comparison may take."""
        return self.alpha / (self.stages * len(LOOKS))

    @property
    def alpha_distance(self) -> float:
        """What is left of it for the distances, beside the missing values."""
        return (1.0 - _MISSING_PART) * self.alpha_look


def concurrent(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which rows of both windows to compare, by the times of all of them (ascending): as many of the one for each of
    the other at any time.

    Else a world that moves while the versions' shares of the traffic change is a difference between the versions. Rows
    before the later begin are left out; in each bin of time, so are those that are too many for a common ratio, which
    is the one of all rows, or else 1, whichever leaves more to compare. All bins have as many rows of the version that
    has fewer.
    """
    times = (first, second)
    begun = max((each[0] for each in times if len(each)), default=0.0)
    fewer = min((each[each >= begun] for each in times), key=len)
    if not len(fewer):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    bins = min(max(len(fewer) // _BIN_ROWS, 1), _BINS_MAX)
    edges = fewer[np.linspace(0, len(fewer) - 1, bins + 1).astype(np.intp)]
    edges[0] = begun
    places = [np.searchsorted(edges, each, side="right") for each in times]
    counts = np.array([np.bincount(each, minlength=bins + 2) for each in places], dtype=float)
    counts[:, 0] = 0.0
    total = counts.sum(axis=1)
    ratios = (1.0, total[0] / total[1]) if total.all() else (1.0,)
    kept = [np.rint(np.minimum(counts, [counts[1] * ratio, counts[0] / ratio])).astype(int) for ratio in ratios]
    best = max(kept, key=lambda each: 1.0 / np.sum(1.0 / np.maximum(each.sum(axis=1), 1e-9)))
    chosen = []
    for place, wanted in zip(places, best, strict=True):
        begins = np.searchsorted(place, np.arange(bins + 2))
        ends = np.searchsorted(place, np.arange(bins + 2), side="right")
        spread = [np.linspace(b, e - 1, n).astype(np.intp) for b, e, n in zip(begins, ends, wanted, strict=True) if n]
        chosen.append(np.concatenate(spread) if spread else np.empty(0, np.intp))
    return chosen[0], chosen[1]


def together(
    times: Sequence[NDArray[np.float64]], requests: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """`concurrent` by whole requests: by the times of both windows' rows (ascending), and which request each row is of,
    numbered in the order of their first rows. Else the windows' requests would not be alike."""
    numbers = [np.unique(each, return_index=True) for each in requests]
    chosen = concurrent(*(at[first] for at, (_, first) in zip(times, numbers, strict=True)))
    first, second = (
        np.flatnonzero(np.isin(each, number[kept]))
        for each, (number, _), kept in zip(requests, numbers, chosen, strict=True)
    )
    return first, second


def standard_errors(chance: float) -> float:
    """How many standard errors, known from `RESAMPLES`, a distance exceeds its true value by with that chance."""
    return -float(special.stdtrit(RESAMPLES - 1, chance))


def lower(column: ColumnDrift, chance: float) -> float:
    """A limit that is above the true distance with that chance only; 0 where the detector gives no standard error.

    Bias and standard error of the distance, by resampling: Davison and Hinkley, "Bootstrap methods and their
    application", 1997, section 5.2; with Student's quantile, since they are known from so many resamples.
    """
    if column.error is None:
        return 0.0
    return max(column.statistic - column.bias - standard_errors(chance) * column.error, 0.0)


def enter_stage(shift: Shift) -> Shift:
    """A new stage: it needs a comparison of its own."""
    return replace(shift, spent=0, seen=None)


def enter_stage_paired(paired: Paired) -> Paired:
    """A new stage: it needs pairs of its own."""
    return replace(paired, in_stage=0.0)


def look(
    gate: Drifting, shift: Shift, scene: Scene, drift: Drift | None, problem: str | None
) -> tuple[Shift, GateReport]:
    """Do the windows differ? `drift` is None on looks without a new comparison."""
    if problem is not None:
        return shift, GateReport("drift", Verdict.ERROR, problem)
    wrong = faults.of_drift(drift) if drift is not None else ""
    if wrong:
        return shift, GateReport("drift", Verdict.ERROR, f"the comparison's {wrong}")
    if drift is not None:
        shift = _take(gate, shift, scene, drift)
    if shift.seen is None:
        return shift, GateReport("drift", Verdict.HOLD, "no comparison in this stage yet", needs="sampled rows")
    return shift, _report(gate, shift, scene, shift.seen)


def _take(gate: Drifting, shift: Shift, scene: Scene, drift: Drift) -> Shift:
    """A new comparison. It may raise an alarm if its turn has come, and if it has rows enough."""
    shift = replace(shift, seen=drift)
    if min(drift.rows_stable, drift.rows_candidate) < gate.rows_min or min(_requests(drift)) < REQUESTS_MIN:
        return shift
    if not may_alarm(shift.spent, scene.elapsed_s, scene.length_s):
        return shift
    return replace(shift, spent=shift.spent + 1, alarm=shift.alarm or _alarm(gate, scene, drift))


def may_alarm(spent: int, elapsed_s: float, length_s: float) -> bool:
    """Whether it is the turn of a comparison that may raise an alarm, when `spent` have had theirs."""
    return spent < len(LOOKS) and elapsed_s >= LOOKS[spent] * length_s


def _alarm(gate: Drifting, scene: Scene, drift: Drift) -> str:
    """Why this comparison raises an alarm; nothing if it does not."""
    column = _missing(drift, scene)
    if column is not None:
        more = column.missing_candidate - column.missing_stable
        return f"{column.column}: {more:.1%} more values are missing"
    # Where the look's share is below what the permutations can say, the limit alone answers for the difference.
    if drift.p_value_max > max(scene.alpha_distance, drift.p_value_least):
        return ""
    each = scene.alpha_distance / len(drift.columns)
    column = max(drift.columns, key=lambda column: lower(column, each))
    if lower(column, each) <= gate.threshold:
        return ""
    return f"{column.column} differs by more than {gate.threshold:.3g}, p {drift.p_value_max:.2g}"


def _missing(drift: Drift, scene: Scene) -> ColumnDrift | None:
    """The column with more missing values in the candidate's rows than chance and the margin allow.

    A request counts as one row: in the worst case either all of its values are missing or none.
    """
    stable, candidate = _requests(drift)
    for column in drift.columns:
        if column.missing_candidate < column.missing_stable + MISSING_MARGIN:
            continue
        chance = stats.more_missing(
            candidate, round(column.missing_candidate * candidate), stable, round(column.missing_stable * stable)
        )  # fmt: skip
        if chance <= _MISSING_PART * scene.alpha_look / len(drift.columns):
            return column
    return None


def _requests(drift: Drift) -> tuple[int, int]:
    """Of how many requests the rows of either version are."""
    stable, candidate = drift.requests_stable, drift.requests_candidate
    return (
        int(drift.rows_stable if stable is None else stable),
        int(drift.rows_candidate if candidate is None else candidate),
    )


def _report(gate: Drifting, shift: Shift, scene: Scene, drift: Drift) -> GateReport:
    worst = _furthest(drift.columns)
    limit = gate.threshold * scene.factor
    rows = int(min(drift.rows_stable, drift.rows_candidate))
    low = lower(worst, scene.alpha_distance / len(drift.columns))
    high = worst.statistic if worst.high is None else worst.high
    lost = max(column.missing_candidate - column.missing_stable for column in drift.columns)
    verdict, needs = Verdict.HOLD, ""
    says = f"{worst.column} differs by {worst.statistic:.3g} ({worst.method}, {low:.3g} to {high:.3g}, {rows:,} rows)"
    if shift.alarm:
        verdict, limit = Verdict.FAIL, gate.threshold
        says += f"; {shift.alarm}"
    elif rows < gate.rows_min:
        needs = f"{gate.rows_min:,} rows of each version"
    elif min(_requests(drift)) < REQUESTS_MIN:
        needs = f"rows of {REQUESTS_MIN} requests of each version"
    elif scene.began is not None and drift.newest is not None and drift.newest < scene.began:
        says += f": no sampled row of the last {scene.began + scene.elapsed_s - drift.newest:.0f} s"
        needs = "rows of both versions that were sampled since the stage began"
    elif lost >= MISSING_MARGIN:
        needs = f"{lost:.1%} more values missing than the stable version's to be explained"
    elif high < limit:
        verdict = Verdict.PASS
        says += f": less than {limit:.3g}"
    else:
        needs = f"more rows, until the distance is shown to be below {limit:.3g}"
    return GateReport(
        gate="drift", verdict=verdict, says=says, statistic=drift.p_value_max, estimate=worst.statistic,
        low=low, high=high, n=int(drift.rows_candidate), threshold=limit, unit=worst.method, needs=needs,
    )  # fmt: skip


def _furthest(columns: Sequence[ColumnDrift]) -> ColumnDrift:
    return max(columns, key=lambda column: column.statistic if column.high is None else column.high)


# ---------------------------------------------------------------- the same requests


def look_paired(
    gate: Disagreement, paired: Paired, factor: float, alpha: float, pairs: Pairs | None, problem: str | None
) -> tuple[Paired, GateReport]:
    """On the very same requests, how often another answer? `pairs` counts from the start of the rollout."""
    if problem is not None:
        return paired, GateReport("disagreement", Verdict.ERROR, problem)
    if pairs is not None:
        wrong = faults.of_pairs(pairs)
        if wrong:
            return paired, GateReport("disagreement", Verdict.ERROR, f"the {wrong}")
        more = pairs.compared - paired.last_compared, pairs.differing - paired.last_differing
        paired = replace(paired, last_compared=float(pairs.compared), last_differing=float(pairs.differing))
        if not 0.0 <= more[1] <= more[0]:
            return paired, GateReport("disagreement", Verdict.HOLD, "the count of pairs began anew")
        paired = replace(
            paired,
            compared=paired.compared + more[0],
            differing=paired.differing + more[1],
            in_stage=paired.in_stage + more[0],
        )
    return paired, _report_paired(gate, paired, factor, alpha)


def _report_paired(gate: Disagreement, paired: Paired, factor: float, alpha: float) -> GateReport:
    n, k = paired.compared, paired.differing
    if n <= 0 or paired.in_stage <= 0:
        return GateReport("disagreement", Verdict.HOLD, "no request answered by both yet", needs="shadow traffic")
    final, limit = min(gate.margin, 0.999), min(gate.margin * factor, 0.999)
    more = float(stats.share_above(n, k, final))
    less = float(stats.share_below(n, k, limit))
    share = k / n
    verdict, needs = Verdict.HOLD, f"more pairs, until the share is shown to be below {limit:.2%}"
    if more >= -math.log(alpha):
        verdict, needs = Verdict.FAIL, ""
    elif less >= -math.log(1.0 - _CONFIDENCE):
        verdict, needs = Verdict.PASS, ""
    word = {Verdict.PASS: f"fewer than {limit:.2%}", Verdict.FAIL: f"more than {final:.2%}"}
    says = f"{share:.2%} of {n:,.0f} requests answered otherwise: " + word.get(
        verdict, f"{limit:.2%} not ruled out yet"
    )
    low, high = stats.share_interval(n, k, 1.0 - _CONFIDENCE)
    return GateReport(
        gate="disagreement", verdict=verdict, says=says, statistic=math.exp(min(more, 600.0)), estimate=share,
        low=low, high=high, n=int(n), threshold=limit, unit="share of pairs", needs=needs,
    )  # fmt: skip
