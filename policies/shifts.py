"""What the sampled rows say: do the two versions' predictions differ, and how often on the very same requests?

The drift detector's comparison is a test for one look. Its share of the error budget is therefore split over a fixed
number of looks, three in each stage; on further looks it may pass, but raise no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from policies import faults, stats
from policies.evidence import ColumnDrift, Drift, Pairs
from policies.policy import Disagreement, Drifting
from policies.verdict import GateReport, Verdict

LOOKS = (0.0, 0.5, 1.0)  # the shares of a stage's length after which a comparison may raise an alarm
_MISSING_PART = 0.1  # of each look's alpha: that values are missing is seen at once, by an exact test
_MISSING_MARGIN = 0.01  # so many more missing values are tolerated
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Shift:
    """The comparisons of this stage: how many could raise an alarm, whether one did, and the newest."""

    spent: int = 0
    alarmed: bool = False
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
    than the final margin the stage's is."""

    elapsed_s: float
    length_s: float
    stages: int
    factor: float
    alpha: float

    @property
    def alpha_look(self) -> float:
        """The chance of a false alarm that one comparison may take."""
        return self.alpha / (self.stages * len(LOOKS))


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
    if min(drift.rows_stable, drift.rows_candidate) < gate.rows_min:
        return shift
    if shift.spent >= len(LOOKS) or scene.elapsed_s < LOOKS[shift.spent] * scene.length_s:
        return shift
    return replace(shift, spent=shift.spent + 1, alarmed=shift.alarmed or _differs(gate, scene, drift))


def _differs(gate: Drifting, scene: Scene, drift: Drift) -> bool:
    if _missing(drift, scene) is not None:
        return True
    unlikely = drift.p_value_max <= (1.0 - _MISSING_PART) * scene.alpha_look
    return unlikely and max(column.statistic for column in drift.columns) >= gate.threshold


def _missing(drift: Drift, scene: Scene) -> ColumnDrift | None:
    """The column with more missing values in the candidate's rows than chance and the margin allow."""
    for column in drift.columns:
        if column.missing_candidate < column.missing_stable + _MISSING_MARGIN:
            continue
        chance = stats.more_missing(
            int(drift.rows_candidate), round(column.missing_candidate * drift.rows_candidate),
            int(drift.rows_stable), round(column.missing_stable * drift.rows_stable),
        )  # fmt: skip
        if chance <= _MISSING_PART * scene.alpha_look / len(drift.columns):
            return column
    return None


def _report(gate: Drifting, shift: Shift, scene: Scene, drift: Drift) -> GateReport:
    worst = _furthest(drift.columns)
    limit = gate.threshold * scene.factor
    rows = int(min(drift.rows_stable, drift.rows_candidate))
    high = worst.statistic if worst.high is None else worst.high
    lost = max(column.missing_candidate - column.missing_stable for column in drift.columns)
    verdict, needs = Verdict.HOLD, ""
    says = f"{worst.column} differs by {worst.statistic:.3g} ({worst.method}, at most {high:.3g}, {rows:,} rows)"
    if shift.alarmed:
        verdict = Verdict.FAIL
        says += f"; more than {gate.threshold:.3g}, p {drift.p_value_max:.2g}"
        if lost >= _MISSING_MARGIN:
            says += f"; {lost:.1%} more values are missing"
    elif rows < gate.rows_min:
        needs = f"{gate.rows_min:,} rows of each version"
    elif lost >= _MISSING_MARGIN:
        needs = f"{lost:.1%} more values missing than the stable version's to be explained"
    elif high < limit:
        verdict = Verdict.PASS
        says += f": less than {limit:.3g}"
    else:
        needs = f"more rows, until the distance is shown to be below {limit:.3g}"
    return GateReport(
        gate="drift", verdict=verdict, says=says, statistic=drift.p_value_max, estimate=worst.statistic,
        low=0.0, high=high, n=int(drift.rows_candidate), threshold=limit, unit=worst.method, needs=needs,
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
