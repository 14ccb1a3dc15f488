"""Is what a version answers in production still what it was made for? One look per period, and what follows from it.

**Few false alarms, and none late.** Chance may raise `false_alarms_per_year` alarms, so one period may raise that many
times its share of the year, split evenly over the tests. For short periods that is less than a permutation test can
show, so each test is made twice in the same period: a random half of the period's requests against one half of the
reference rows, the other half against the other. The halves share no row, so without drift their p-values are
independent, and the chance that both are below a is a^2: each is held to the square root of what the test may spend.
A drift that lasts is in both halves, and is found in the first period that it fills. (Confirmation by the *next* period
would cost a period of delay, and would be worth little against the same reference rows: an unlucky reference is
unlucky again.)

**A smallest effect.** The world is never exactly as it was; a difference up to the threshold is none. An alarm needs a
lower limit of the distance beyond it, at the same chance: a world that stays exactly there is as rarely an alarm.

**No alarm without evidence, and no all-clear either**: missing rows hold, a source that is down is an error, and
"no drift" is said only where the distance is shown to be below the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from policies import faults, labels, shifts, stats
from policies.evidence import NONE, ColumnDrift, Drift, Outcomes, Sums
from policies.labels import CONFIDENCE, Learned
from policies.policy import LiveDrift, LiveQuality, Monitor
from policies.verdict import GateReport, Verdict, worst

YEAR_S = 365.25 * 86400.0
_PERMUTATIONS_MIN = 199
# What each gate's alarm is about. `estimate` is told and decides nothing.
KINDS: Mapping[str, str] = {
    "predictions": "drift",
    "inputs": "drift",
    "categories": "drift",
    "missing": "drift",
    "data": "data",
    "quality": "quality",
}
_GROUPS = ("predictions", "inputs", "categories")
_DRIFT_TESTS = 4
LOOKED, TOLD = "monitored", "told"  # the ledger's entries: a look, and that everybody who should know was told


@dataclass(frozen=True)
class Group:
    """Columns that are tested together: `predictions`, `inputs` (numbers) or `categories` (text).

    The live rows are the `candidate` side. `whole` compares all of them, for distances and their limits; `halves` are
    one half of the live rows with one half of the reference rows each, for the p-values.
    """

    name: str
    whole: Drift
    halves: tuple[Drift, Drift]


@dataclass(frozen=True)
class Estimate:
    """The loss that the predictions' own probabilities let one expect, live and on the validation rows, and what it
    really was there; `calibrated` on those."""

    metric: str
    live: float
    validation: float | None = None
    realised: float | None = None

    @property
    def calibrated(self) -> bool:
        return self.realised is not None


@dataclass(frozen=True)
class Seen:
    """What one look brought back, JSON-able. `problems` and `lacking` say by source (`rows`, `drift` or one group's
    name, `data`, `labels`) what could not be read, and what is not there yet. `reference` names the rows that were
    compared with."""

    model: str
    version: str
    since: float
    until: float
    rows: int = 0
    reference: str = ""
    groups: tuple[Group, ...] = ()
    data: GateReport | None = None
    live: Sums = NONE  # losses of labelled answers whose labels came in this period
    validation: Sums = NONE
    unlabelled: int = 0
    estimate: Estimate | None = None
    problems: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)


def seen_from(body: Mapping[str, Any]) -> Seen:
    """The evidence that `dataclasses.asdict` made, also after a detour through JSON."""

    def drift(half: Mapping[str, Any]) -> Drift:
        return Drift(**{**half, "columns": tuple(ColumnDrift(**column) for column in half["columns"])})

    groups = tuple(
        Group(each["name"], drift(each["whole"]), (drift(each["halves"][0]), drift(each["halves"][1])))
        for each in body["groups"]
    )
    data = body["data"] and GateReport(**{**body["data"], "verdict": Verdict(body["data"]["verdict"])})
    made = {
        "groups": groups,
        "data": data,
        "live": Sums(**body["live"]),
        "validation": Sums(**body["validation"]),
        "estimate": body["estimate"] and Estimate(**body["estimate"]),
    }
    return Seen(**{**body, **made})


# ---------------------------------------------------------------- what chance may do


def alpha(rules: Monitor) -> float:
    """The chance of a false alarm that one test may take in one period."""
    tests = (_DRIFT_TESTS if rules.drift else 0) + (1 if rules.quality else 0)
    return rules.false_alarms_per_year * rules.every / YEAR_S / max(tests, 1)


def alpha_half(rules: Monitor) -> float:
    """What the p-value of each half is held to."""
    return math.sqrt(alpha(rules))


def permutations(rules: Monitor) -> int:
    """How many permutations each half needs, so that its p-value can be as small as an alarm asks for."""
    return max(math.ceil(1.0 / alpha_half(rules)), _PERMUTATIONS_MIN)


# ---------------------------------------------------------------- a look


def judge(rules: Monitor, seen: Seen) -> tuple[GateReport, ...]:
    """One report per question that the policy asks, and the estimate where there is one."""
    reports: list[GateReport] = []
    if rules.drift is not None:
        reports += _drift(rules, rules.drift, seen)
    if rules.data is not None:
        reports.append(_fault(seen, "data", "rows", "data") or seen.data or _nothing("data"))
    if rules.quality is not None:
        fault = _fault(seen, "quality", "labels")
        reports.append(fault or _quality(rules.quality, seen, alpha(rules)))
    if seen.estimate is not None:
        reports.append(_estimated(rules, seen.estimate, seen.rows))
    return tuple(reports)


def verdict_of(reports: Iterable[GateReport]) -> Verdict:
    """The worst word of the gates that decide."""
    return worst(report.verdict for report in reports if report.gate in KINDS)


def summary(reports: Iterable[GateReport]) -> str:
    """What the gates with the worst word say, in a line."""
    said = [report for report in reports if report.gate in KINDS]
    verdict = worst(report.verdict for report in said)
    if said and verdict is Verdict.PASS:
        return "nothing is amiss"
    return "; ".join(f"{each.gate}: {each.says}" for each in said if each.verdict is verdict) or "nothing was asked"


def _nothing(gate: str) -> GateReport:
    return GateReport(gate, Verdict.HOLD, "nothing was looked at")


def _fault(seen: Seen, gate: str, *sources: str) -> GateReport | None:
    for source in sources:
        if source in seen.problems:
            return GateReport(gate, Verdict.ERROR, f"could not look: {seen.problems[source]}")
    for source in sources:
        if source in seen.lacking:
            return GateReport(gate, Verdict.HOLD, seen.lacking[source], needs="evidence")
    return None


def _drift(rules: Monitor, gate: LiveDrift, seen: Seen) -> list[GateReport]:
    fault = _fault(seen, "drift", "rows", "drift")
    lost = [each for name in _GROUPS if (each := _fault(seen, name, name))]
    if fault is None and not seen.groups and not lost:
        fault = _nothing("drift")
    if fault is None:
        drifts = [each for group in seen.groups for each in (group.whole, *group.halves)]
        wrong = next((text for drift in drifts if (text := faults.of_drift(drift))), "")
        fault = GateReport("drift", Verdict.ERROR, f"the comparison's {wrong}") if wrong else None
    if fault is not None:
        return [replace(fault, gate=gate) for gate in ("predictions", "inputs")]
    compared = [_compared(rules, gate, group, seen) for group in seen.groups]
    missing = [_missing(gate, seen, alpha(rules))] if seen.groups else []
    if lost:  # where some columns were not looked at, nobody knows that none misses values
        missing = [each if each.verdict is Verdict.FAIL else replace(lost[0], gate=each.gate) for each in missing]
    return [*lost, *compared, *missing]


def _few(gate: LiveDrift, group: Group) -> str:
    """What lacks, if the rows are too few."""
    live, reference = group.whole.rows_candidate, group.whole.rows_stable
    if live < gate.rows_min:
        return f"{gate.rows_min:,} sampled rows in a period (it has {live:,})"
    return f"{gate.rows_min:,} reference rows (there are {reference:,})" if reference < gate.rows_min else ""


def _compared(rules: Monitor, gate: LiveDrift, group: Group, seen: Seen) -> GateReport:
    """Do the group's columns differ from the reference, in both halves, and by more than the threshold?"""
    columns = group.whole.columns
    chance = alpha(rules) / len(columns)
    furthest = max(columns, key=lambda column: (shifts.lower(column, chance), column.statistic))
    low = shifts.lower(furthest, chance)
    high = max(math.inf if column.high is None else column.high for column in columns)
    p_half = max(half.p_value_max for half in group.halves)
    few = _few(gate, group)
    says = f"{furthest.column} is {furthest.statistic:.3g} from the {seen.reference} ({furthest.method}"
    says += f"; no column is more than {high:.3g})"
    verdict, needs = Verdict.HOLD, f"more rows, until {gate.threshold:g} is ruled out"
    if few:
        needs = few
    elif p_half <= alpha_half(rules) and low > gate.threshold:
        verdict, needs = Verdict.FAIL, ""
        says += f": drift of more than {gate.threshold:g}; chance of this without one: below {p_half**2:.1g}"
    elif high < gate.threshold:
        verdict, needs = Verdict.PASS, ""
        says += f": less than {gate.threshold:g}"
    return GateReport(
        gate=group.name, verdict=verdict, says=says, statistic=p_half**2, estimate=furthest.statistic, low=low,
        high=high, n=int(group.whole.rows_candidate), threshold=gate.threshold, unit=furthest.method, needs=needs,
    )  # fmt: skip


def _missing(gate: LiveDrift, seen: Seen, share: float) -> GateReport:
    """Are more values missing than in the reference, or fewer? Fisher's exact test per column."""
    found: list[tuple[float, float, str]] = []
    for group in seen.groups:
        n_live, n_reference = int(group.whole.rows_candidate), int(group.whole.rows_stable)
        for column in group.whole.columns:
            live, reference = round(column.missing_candidate * n_live), round(column.missing_stable * n_reference)
            chance = 2 * min(
                stats.more_missing(n_live, live, n_reference, reference),
                stats.more_missing(n_reference, reference, n_live, live),
            )
            found.append((min(chance, 1.0), column.missing_candidate - column.missing_stable, column.column))
    few = next(filter(None, (_few(gate, group) for group in seen.groups)), "")
    large = [each for each in found if abs(each[1]) >= shifts.MISSING_MARGIN]
    chance, difference, name = min(large) if large else max(found, key=lambda each: abs(each[1]))
    says = f"{abs(difference):.1%} {'more' if difference >= 0 else 'fewer'} values of {name} are missing"
    verdict, needs = Verdict.PASS, ""
    if few:
        verdict, needs = Verdict.HOLD, few
    elif large and chance <= share / len(found):
        verdict = Verdict.FAIL
        says += f" than in the {seen.reference}; chance of this without a change: {chance:.1g}"
    elif large:
        verdict, needs = Verdict.HOLD, "more rows, to tell this from chance"
    return GateReport(
        gate="missing", verdict=verdict, says=says, statistic=chance, estimate=difference, n=seen.rows,
        threshold=shifts.MISSING_MARGIN, unit="share of values", needs=needs,
    )  # fmt: skip


def _quality(gate: LiveQuality, seen: Seen, share: float) -> GateReport:
    """Is the mean loss on the labels that came higher than on the validation rows? A bet, as in `policies.labels`."""
    for name, sums in (("live", seen.live), ("validation", seen.validation)):
        wrong = faults.of_outcomes(Outcomes(seen.until, candidate=sums, waiting=seen.unlabelled))
        if wrong:
            return GateReport("quality", Verdict.ERROR, f"the {name} labels' {wrong}")
    rows = min(seen.live.n, seen.validation.n)
    if rows < gate.rows_min:
        of = "labelled requests" if seen.live.n < gate.rows_min else "labelled validation rows"
        says = f"{seen.live.n:,.0f} labels came in this period ({seen.unlabelled:,} answers have none)"
        return GateReport("quality", Verdict.HOLD, says, n=int(seen.live.n), needs=f"{gate.rows_min:,} {of}")
    learned = labels.count(Learned(), NONE, seen.live, seen.validation, gate.margin)
    worse, fine = float(labels.log_worse(learned)), float(labels.log_no_worse(learned))
    estimate, low, high = labels.difference(learned, gate.rows_min)
    verdict, needs = Verdict.HOLD, "more labels"
    says = f"{gate.metric} loss {seen.live.mean:.4f}, {seen.validation.mean:.4f} on the validation rows"
    if worse >= -math.log(share):
        verdict, needs = Verdict.FAIL, ""
        says += f": higher by more than half of {gate.margin:g}; chance of this by accident: below {share:.1g}"
    elif fine >= -math.log(1.0 - CONFIDENCE):
        verdict, needs = Verdict.PASS, ""
        says += f": not higher by {gate.margin:g}"
    return GateReport(
        gate="quality", verdict=verdict, says=says, statistic=math.exp(min(worse, 600.0)), estimate=estimate, low=low,
        high=high, n=int(seen.live.n), threshold=gate.margin, unit=f"difference of the mean loss ({gate.metric})",
        needs=needs,
    )  # fmt: skip


# ---------------------------------------------------------------- quality without labels


def estimate(
    metric: str, scores: Sequence[float], known: tuple[Sequence[float], Sequence[float]] | None
) -> Estimate | None:
    """The loss to be expected of probabilities `scores`, if they are still right about the truth; None if they are no
    probabilities. `known` are scores and truth of the validation rows, on which they are calibrated first.

    Confidence-based performance estimation, as NannyML has it: the expected loss under the calibrated probability.
    """
    live = np.asarray(scores, dtype=float)
    if live.size == 0 or not (np.isfinite(live).all() and live.min() >= 0.0 and live.max() <= 1.0):
        return None
    if known is None or len(known[0]) == 0:
        return Estimate(metric, _expected(metric, live, live))
    before, truth = np.asarray(known[0], dtype=float), np.asarray(known[1], dtype=float)
    points, at, counts = np.unique(before, return_inverse=True, return_counts=True)
    rates = np.bincount(at, weights=truth) / counts
    chance = isotonic_regression(rates, weights=counts).x
    realised = float(np.mean(truth * _losses(metric, before, 1.0) + (1.0 - truth) * _losses(metric, before, 0.0)))
    return Estimate(
        metric,
        _expected(metric, live, np.interp(live, points, chance)),
        _expected(metric, before, np.interp(before, points, chance)),
        realised,
    )


def _expected(metric: str, scores: Any, chance: Any) -> float:
    return float(np.mean(chance * _losses(metric, scores, 1.0) + (1.0 - chance) * _losses(metric, scores, 0.0)))


def _losses(metric: str, scores: Any, truth: float) -> Any:
    return np.square(scores - truth) if metric == "brier" else ((scores >= 0.5) != (truth >= 0.5)).astype(float)


def _estimated(rules: Monitor, found: Estimate, rows: int) -> GateReport:
    says = f"{found.metric} loss estimated from the predictions alone: {found.live:.4f}"
    if found.calibrated:
        says += f" (on the validation rows it was {found.realised:.4f})"
    says += "; this cannot see that the relation of inputs and outcome changed (concept drift): only labels can"
    margin = rules.quality.margin if rules.quality else None
    worse = found.realised is not None and margin is not None and found.live - found.realised > margin
    return GateReport(
        gate="estimate", verdict=Verdict.HOLD if worse else Verdict.PASS, says=says, estimate=found.live, n=rows,
        threshold=margin, unit=f"mean loss ({found.metric})", needs="labels" if worse else "",
    )  # fmt: skip


# ---------------------------------------------------------------- what follows


@dataclass(frozen=True)
class Steps:
    """What is to be done: `standing` alarms, those that `began` or `ended` with this look; whether to retrain or go
    back."""

    standing: tuple[str, ...]
    began: tuple[str, ...]
    ended: tuple[str, ...]
    retrain: bool
    rollback: bool


def steps(
    rules: Monitor,
    reports: Sequence[GateReport],
    standing: Iterable[str],
    owed: bool,
    went_back: bool,
    unacted: Collection[str] = (),
) -> Steps:
    """What follows from the reports, where these alarms stood after the look before, also at another version.

    An alarm ends when all its gates pass or none is asked any more, not when nobody could look. Only its beginning
    acts, if need be later: of those that stand, `unacted` are those whose beginning has not been acted on. A way back
    that could not be done then (`owed`) is asked for as long as the alarm stands. A version that came back by a
    rollback (`went_back`) is not taken back itself: two versions that both drift would take turns for ever.
    """
    words: dict[str, list[Verdict]] = {}
    for report in reports:
        if report.gate in KINDS:
            words.setdefault(KINDS[report.gate], []).append(report.verdict)
    before = set(standing)
    failed = {kind for kind, said in words.items() if Verdict.FAIL in said}
    lasting = {kind for kind in before if any(word is not Verdict.PASS for word in words.get(kind, ()))}
    began = (failed - before) | (lasting & set(unacted))
    acting = (failed | lasting if owed else began) & set(rules.rollback_on)
    return Steps(
        standing=tuple(sorted(failed | lasting)),
        began=tuple(sorted(began)),
        ended=tuple(sorted(before - failed - lasting - set(unacted))),
        retrain=rules.retrain is not None and bool(began & {"drift", "quality"}),
        rollback=bool(acting) and not went_back,
    )


def metrics(seen: Seen, reports: Sequence[GateReport]) -> dict[str, float]:
    """The look in figures, for a time series: distances per column, and each gate's estimate."""
    found = {"monitor.rows": float(seen.rows)}
    for group in seen.groups:
        for column in group.whole.columns:
            found[f"monitor.{group.name}.{column.column}"] = column.statistic
    for report in reports:
        if report.estimate is not None:
            found[f"monitor.{report.gate}"] = report.estimate
        if report.gate in KINDS:
            found[f"monitor.{report.gate}.alarm"] = float(report.verdict is Verdict.FAIL)
    return found


def to_body(seen: Seen) -> dict[str, Any]:
    """The evidence as JSON-able values."""
    return asdict(seen)
