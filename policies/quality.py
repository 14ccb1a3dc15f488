"""Offline quality: is the candidate no worse than the champion on the same labelled rows? And parity: does it answer
as the training framework did?

Every metric is paired: both versions answered the same rows, so what the rows have in common cancels out. Differences
are gains, positive where the candidate is better, whether the metric is a score or a loss.

Intervals: DeLong, DeLong & Clarke-Pearson 1988 for the AUC (by midranks, Sun & Xu 2014); Bonett & Price 2012 for the
accuracy of paired answers; for the rest the mean of the rows' influence on the metric (exact for means of losses, the
delta method for rmse and f1) with Student's t. Non-inferior is a version whose interval ends above minus the margin.
No rows, NaN, too few rows or a missing baseline never pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from policies.policy import Quality, Validate
from policies.verdict import GateReport, Verdict, worst

Floats = NDArray[np.float64]

ROWS_MIN = 30  # the normal approximations below are not to be trusted under it
CLASS_ROWS_MIN = 10  # of each class, where the metric compares classes
CUTOFF = 0.5  # a prediction from here on says "yes", for accuracy and f1
BASELINE_FAILURES_MAX = 0.1  # share of rows on which the champion may have failed and still be a baseline
LOSSES = frozenset({"log_loss", "brier", "mae", "rmse"})
_BINARY = frozenset({"roc_auc", "accuracy", "f1", "log_loss", "brier"})
_PROBABILITIES = frozenset({"log_loss", "brier"})
_BOUNDED = frozenset({"roc_auc", "accuracy", "f1", "brier"})  # between 0 and 1


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the true value with the confidence asked for."""

    estimate: float
    low: float
    high: float


def metric(name: str, truth: ArrayLike, prediction: ArrayLike) -> float:
    """The metric's value; NaN where it is undefined (no rows, one class only, a value that is not finite)."""
    return _value_and_influence(name, _floats(truth), _floats(prediction))[0]


def gain(name: str, truth: ArrayLike, candidate: ArrayLike, champion: ArrayLike, confidence: float) -> Interval:
    """How much better the candidate is, with a two-sided interval. NaN throughout where the metric is undefined."""
    y, a, b = _floats(truth), _floats(candidate), _floats(champion)
    sign = -1.0 if name in LOSSES else 1.0
    if name == "accuracy" and len(y):
        return _paired_proportions((a >= CUTOFF) == (y > 0), (b >= CUTOFF) == (y > 0), confidence)
    value_a, influence_a = _value_and_influence(name, y, a)
    value_b, influence_b = _value_and_influence(name, y, b)
    half = _half_width(name, y, influence_a - influence_b, confidence, same=bool(np.array_equal(a, b)))
    estimate = sign * (value_a - value_b)
    return Interval(estimate, estimate - half, estimate + half)


def level(name: str, truth: ArrayLike, prediction: ArrayLike, confidence: float) -> Interval:
    """The metric itself with a two-sided interval."""
    y, a = _floats(truth), _floats(prediction)
    value, influence = _value_and_influence(name, y, a)
    half = _half_width(name, y, influence, confidence, same=False)
    return Interval(value, value - half, value + half)


def quality(
    rules: Quality,
    truth: ArrayLike,
    candidate: ArrayLike,
    champion: ArrayLike | None,
    *,
    first: bool = False,
    gate: str = "quality",
    margin: float | None = None,
) -> GateReport:
    """Pass: shown to be no worse than the champion by more than the margin, and to reach the minimum, if one is set.

    `champion` is None where there is no baseline; that is an error unless `first` says that none can be there. Then
    only the minimum counts. A prediction that is not finite is a row that failed.
    """
    y, a = _floats(truth), _floats(candidate)
    wrong = _unusable(rules.metric, y, a)
    if wrong is not None:
        return GateReport(gate, wrong[0], wrong[1], n=len(y), unit=rules.metric)
    reports = []
    if champion is None:
        if not first:
            return GateReport(
                gate,
                Verdict.ERROR,
                "no baseline to compare with",
                n=len(y),
                unit=rules.metric,
                needs="the champion's answers",
            )
    else:
        reports.append(_against(rules, y, a, _floats(champion), gate, rules.margin if margin is None else margin))
    if rules.minimum is not None:
        reports.append(_minimum(rules, y, a, gate))
    if not reports:
        value = metric(rules.metric, y, a)
        says = f"{rules.metric} is {value:.4g} on {len(y)} rows; a first version has no baseline, and no minimum is set"
        return GateReport(gate, Verdict.PASS, says, estimate=value, n=len(y), unit=rules.metric)
    verdict = worst(report.verdict for report in reports)
    return next(report for report in reports if report.verdict is verdict)


def by_slice(
    checks: Validate,
    truth: ArrayLike,
    candidate: ArrayLike,
    champion: ArrayLike | None,
    groups: Mapping[str, Sequence[str]],
) -> tuple[tuple[GateReport, ...], tuple[GateReport, ...]]:
    """The slices that say something (pass or fail), and those that are only reported: too few rows to tell.

    `groups` has per column its value on each row. A slice fails where the candidate is shown to be worse than the
    champion and by more than `slice_margin` in its estimate. The intervals are widened for the number of slices looked
    at (Bonferroni), so that many slices do not make a good version fail. Without a champion nothing is judged.
    """
    y, a = _floats(truth), _floats(candidate)
    b = None if champion is None else _floats(champion)
    parts = [
        (f"quality[{column}={value}]", np.asarray(values, dtype=object) == value)
        for column, values in groups.items()
        for value in sorted(set(values))
    ]
    looked = sum(int(rows.sum()) >= checks.slice_rows_min for _, rows in parts)
    judged: list[GateReport] = []
    open_: list[GateReport] = []
    for gate, rows in parts:
        report = _slice(checks, y[rows], a[rows], None if b is None else b[rows], gate, max(1, looked))
        (open_ if report.verdict is Verdict.HOLD else judged).append(report)
    return tuple(judged), tuple(open_)


def parity(expected: ArrayLike, seen: ArrayLike, tolerance: float) -> GateReport:
    """Pass: every answer is within `tolerance` (relative beyond 1) of the training framework's for the same row."""
    gate, unit = "parity", "largest difference"
    want, got = _floats(expected), _floats(seen)
    if len(want) == 0 or len(want) != len(got):
        says = f"{len(got)} answers for {len(want)} expected ones"
        return GateReport(gate, Verdict.HOLD, says, n=len(got), unit=unit, needs="rows with expected predictions")
    if not np.isfinite(want).all():
        return GateReport(
            gate,
            Verdict.ERROR,
            f"{int((~np.isfinite(want)).sum())} expected predictions are not finite",
            n=len(got),
            unit=unit,
        )
    failed = int((~np.isfinite(got)).sum())
    if failed:
        return GateReport(gate, Verdict.FAIL, f"no finite answer on {failed} of {len(got)} rows", n=len(got), unit=unit)
    distance = np.abs(got - want) / np.maximum(1.0, np.abs(want))
    at = int(distance.argmax())
    beyond = int((distance > tolerance).sum())
    says = f"largest difference from the training framework's answers {distance[at]:.3g} over {len(got)} rows"
    if beyond:
        says = (
            f"{beyond} of {len(got)} answers differ from the training framework's; "
            f"most in row {at}: {got[at]:.6g} for {want[at]:.6g}"
        )
    return GateReport(
        gate,
        Verdict.FAIL if beyond else Verdict.PASS,
        says,
        estimate=float(distance[at]),
        n=len(got),
        threshold=tolerance,
        unit=unit,
    )


# -- verdicts


def _unusable(name: str, y: Floats, a: Floats) -> tuple[Verdict, str] | None:
    """Why nothing can be said, and what verdict that is; None if something can."""
    if len(y) != len(a):
        return Verdict.ERROR, f"{len(a)} answers for {len(y)} rows"
    if len(y) == 0:
        return Verdict.HOLD, "no validation rows"
    if not np.isfinite(y).all():
        return Verdict.ERROR, f"the label is not finite in {int((~np.isfinite(y)).sum())} of {len(y)} rows"
    failed = int((~np.isfinite(a)).sum())
    if failed:
        return Verdict.FAIL, f"no finite prediction on {failed} of {len(y)} rows"
    if name in _BINARY and not np.isin(y, (0.0, 1.0)).all():
        other = y[~np.isin(y, (0.0, 1.0))][0]
        return Verdict.ERROR, f"{name} needs labels 0 and 1; there is {other:g}"
    if name in _PROBABILITIES and ((a < 0) | (a > 1)).any():
        return Verdict.FAIL, f"{name} needs predictions between 0 and 1; there is {a[(a < 0) | (a > 1)][0]:g}"
    if len(y) < ROWS_MIN:
        return Verdict.HOLD, f"{len(y)} rows are too few for an interval; {ROWS_MIN} at least"
    if name in ("roc_auc", "f1"):
        smaller = int(min((y == 0).sum(), (y == 1).sum()))
        if smaller < CLASS_ROWS_MIN:
            return Verdict.HOLD, f"{smaller} rows of the smaller class; {name} needs {CLASS_ROWS_MIN} at least"
    return None


def _against(rules: Quality, y: Floats, a: Floats, b: Floats, gate: str, margin: float) -> GateReport:
    name = rules.metric
    answered = np.isfinite(b) if len(b) == len(y) else np.zeros(len(y), dtype=bool)
    if answered.mean() < 1 - BASELINE_FAILURES_MAX:
        says = f"the champion answered {int(answered.sum())} of {len(y)} rows: no baseline"
        return GateReport(gate, Verdict.ERROR, says, n=len(y), unit=name, needs="the champion's answers")
    y, a, b = y[answered], a[answered], b[answered]
    wrong = _unusable(name, y, b)
    if wrong is not None:  # never the candidate's fault
        return GateReport(
            gate,
            Verdict.HOLD if wrong[0] is Verdict.HOLD else Verdict.ERROR,
            f"champion: {wrong[1]}",
            n=len(y),
            unit=name,
        )
    seen = gain(name, y, a, b, rules.confidence)
    verdict = _verdict(seen, -margin)
    left_out = f", {int((~answered).sum())} rows left out on which the champion failed" if not answered.all() else ""
    shown = {
        Verdict.PASS: "not worse by more than the margin",
        Verdict.FAIL: "worse by more than the margin",
        Verdict.HOLD: "not shown to be within the margin",
        Verdict.ERROR: "undefined",
    }[verdict]
    says = (
        f"{name} {metric(name, y, a):.4f} against {metric(name, y, b):.4f}: gain {seen.estimate:+.4f} "
        f"({seen.low:+.4f} to {seen.high:+.4f}), {shown} {margin:g}{left_out}"
    )
    return _report(gate, verdict, says, seen, len(y), -margin, f"gain in {name}")


def _minimum(rules: Quality, y: Floats, a: Floats, gate: str) -> GateReport:
    assert rules.minimum is not None
    name, bar = rules.metric, rules.minimum
    seen = level(name, y, a, rules.confidence)
    sign = -1.0 if name in LOSSES else 1.0
    ends = sorted((sign * seen.low, sign * seen.high))
    verdict = _verdict(Interval(sign * seen.estimate, *ends), sign * bar)
    word = "maximum" if name in LOSSES else "minimum"
    says = f"{name} {seen.estimate:.4f} ({seen.low:.4f} to {seen.high:.4f}), {word} {bar:g}"
    return _report(gate, verdict, says, seen, len(y), bar, name)


def _slice(checks: Validate, y: Floats, a: Floats, b: Floats | None, gate: str, looked: int) -> GateReport:
    rules = checks.quality
    if len(y) < checks.slice_rows_min:
        says = f"{len(y)} rows, fewer than the {checks.slice_rows_min} of slice_rows_min: reported, not judged"
        return GateReport(
            gate, Verdict.HOLD, says, estimate=_finite(metric(rules.metric, y, a)), n=len(y), unit=rules.metric
        )
    if b is None:
        says = f"{rules.metric} {metric(rules.metric, y, a):.4f}: reported, not judged without a baseline"
        return GateReport(
            gate, Verdict.HOLD, says, estimate=_finite(metric(rules.metric, y, a)), n=len(y), unit=rules.metric
        )
    stricter = rules.model_copy(update={"confidence": 1 - (1 - rules.confidence) / looked, "minimum": None})
    report = quality(stricter, y, a, b, gate=gate, margin=checks.slice_margin)
    if report.verdict is not Verdict.HOLD or report.high is None or report.estimate is None:
        return report
    if report.high < 0 and report.estimate < -checks.slice_margin:
        says = report.says.replace(
            "not shown to be within the margin", "worse, and in its estimate by more than the margin"
        )
        return GateReport(**{**report.__dict__, "verdict": Verdict.FAIL, "says": says, "needs": ""})
    return report


def _verdict(seen: Interval, bar: float) -> Verdict:
    if not all(map(math.isfinite, (seen.estimate, seen.low, seen.high))):
        return Verdict.HOLD
    if seen.low >= bar:
        return Verdict.PASS
    return Verdict.FAIL if seen.high < bar else Verdict.HOLD


def _report(gate: str, verdict: Verdict, says: str, seen: Interval, n: int, threshold: float, unit: str) -> GateReport:
    needs = ""
    half = (seen.high - seen.low) / 2
    if verdict is Verdict.HOLD and half > 0 and math.isfinite(half):
        room = abs(seen.estimate - threshold)
        needs = f"about {math.ceil(n * (half / room) ** 2)} rows, if the estimate stays" if room > 0 else "more rows"
    return GateReport(
        gate,
        verdict,
        says,
        estimate=_finite(seen.estimate),
        low=_finite(seen.low),
        high=_finite(seen.high),
        n=n,
        threshold=threshold,
        unit=unit,
        needs=needs,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- metrics: the value, and each row's influence on it (mean 0; the variance of its mean is that of the metric)


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _value_and_influence(name: str, y: Floats, a: Floats) -> tuple[float, Floats]:
    nothing = math.nan, np.full(len(y), np.nan)
    if len(y) == 0 or not (np.isfinite(y).all() and np.isfinite(a).all()):
        return nothing
    return _METRICS[name](y, a) or nothing


def _mean(rows: Floats) -> tuple[float, Floats]:
    value = float(rows.mean())
    return value, rows - value


def _roc_auc(y: Floats, a: Floats) -> tuple[float, Floats] | None:
    yes = y > 0
    m, n = int(yes.sum()), int((~yes).sum())
    if m == 0 or n == 0:
        return None
    ranks = stats.rankdata(a)
    within = np.empty_like(ranks)
    within[yes], within[~yes] = stats.rankdata(a[yes]), stats.rankdata(a[~yes])
    # DeLong's structural components: for each row, the share of the other class that it is ranked rightly against.
    component = np.where(yes, (ranks - within) / n, 1.0 - (ranks - within) / m)
    value = float(component[yes].mean())
    return value, (component - value) * (m + n) / np.where(yes, m, n)


def _accuracy(y: Floats, a: Floats) -> tuple[float, Floats]:
    return _mean(((a >= CUTOFF) == (y > 0)).astype(np.float64))


def _f1(y: Floats, a: Floats) -> tuple[float, Floats] | None:
    says, is_ = a >= CUTOFF, y > 0
    hits = 2.0 * (says & is_)
    all_ = hits + (says ^ is_)
    if all_.sum() == 0:
        return None
    value = float(hits.sum() / all_.sum())
    return value, (hits - value * all_) / all_.mean()


def _log_loss(y: Floats, a: Floats) -> tuple[float, Floats]:
    tiny = np.finfo(np.float64).eps
    p = np.clip(a, tiny, 1 - tiny)
    return _mean(-np.where(y > 0, np.log(p), np.log1p(-p)))


def _rmse(y: Floats, a: Floats) -> tuple[float, Floats]:
    mse, influence = _mean((a - y) ** 2)
    root = math.sqrt(mse)
    return root, influence / (2 * root) if root > 0 else influence


_METRICS: Mapping[str, Callable[[Floats, Floats], tuple[float, Floats] | None]] = {
    "roc_auc": _roc_auc,
    "accuracy": _accuracy,
    "f1": _f1,
    "log_loss": _log_loss,
    "brier": lambda y, a: _mean((a - y) ** 2),
    "mae": lambda y, a: _mean(np.abs(a - y)),
    "rmse": _rmse,
}


def _half_width(name: str, y: Floats, influence: Floats, confidence: float, same: bool) -> float:
    n = len(y)
    if n < 2 or not np.isfinite(influence).all():
        return math.nan
    if name == "roc_auc":
        yes = y > 0
        m = int(yes.sum())
        if min(m, n - m) < 2:
            return math.nan
        # S10 / m + S01 / (n - m), with each class' own n - 1; the influence carries the factors n / m and n / (n - m).
        variance = m * influence[yes].var(ddof=1) / n**2 + (n - m) * influence[~yes].var(ddof=1) / n**2
        fewest = min(m, n - m)
    else:
        variance, fewest = float(influence.var(ddof=1)) / n, n
    if variance == 0 and not same and name in _BOUNDED:
        # No difference seen in n rows that might have shown one: the rule of three, not certainty.
        return -math.log((1 - confidence) / 2) / fewest
    return float(stats.t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(variance))


def _paired_proportions(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_], confidence: float) -> Interval:
    """Bonett & Price 2012: Wald's interval with one row added to each kind of disagreement; never of width 0."""
    n = len(right_a)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval((only_a - only_b) / n, max(-1.0, p - q - half), min(1.0, p - q + half))
