"""Evidence that is missing or makes no sense, told apart from evidence.

What could not be read, or cannot be true, is an error; what is only missing, or must first begin anew, is a hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policies.evidence import LATENCY_EDGES_MS, SCORE_EDGES, Counts, Drift, Evidence, Outcomes, Pairs, Sums
from policies.verdict import GateReport, Verdict

_ELSEWHERE = ("drift", "pairs", "labels")  # problems of these sources are told by the gates that use them
# A failed attempt may be counted before its request is, which ends when another version has answered: a candidate that
# fails always has more errors than requests, by those under way, and that is no nonsense.
_IN_FLIGHT = 100


@dataclass(frozen=True)
class Fault:
    """Why there is no evidence. With `begin_anew`, the next look is compared with this one."""

    verdict: Verdict
    says: str
    begin_anew: bool = False

    def report(self, gate: str) -> GateReport:
        """The gate's report: it has nothing to go by."""
        return GateReport(gate, self.verdict, self.says)


def of_clock(before: float | None, now: Any) -> Fault | None:
    """What is wrong with the time of the look."""
    if not _is_number(now):
        return Fault(Verdict.ERROR, f"the time of the look is {now!r}, not a number")
    if before is not None and now < before:
        return Fault(Verdict.ERROR, f"the clock went back by {before - now:.1f} s", begin_anew=True)
    return None


def of_counts(evidence: Evidence) -> Fault | None:
    """What is wrong with the counters, taken by themselves."""
    problems = {name: text for name, text in evidence.problems.items() if name not in _ELSEWHERE}
    if problems:
        return Fault(Verdict.ERROR, "; ".join(f"{name}: {text}" for name, text in sorted(problems.items())))
    for owner, counts in (("stable version", evidence.stable), ("candidate", evidence.candidate)):
        if counts is None:
            return Fault(Verdict.HOLD, f"no counters of the {owner}")
        wrong = _wrong(counts)
        if wrong:
            return Fault(Verdict.ERROR, f"the {owner}'s {wrong}")
    return None


def of_change(before: Counts, now: Counts, owner: str) -> Fault | None:
    """Whether the counters began anew between two looks."""
    if before.epoch != now.epoch:
        return Fault(Verdict.HOLD, f"the {owner}'s counters began anew")
    fell = now.requests < before.requests or now.errors < before.errors
    for old, new in ((before.latency, now.latency), (before.scores, now.scores)):
        fell = fell or len(old) != len(new) or any(b < a for a, b in zip(old, new, strict=True))
    return Fault(Verdict.HOLD, f"the {owner}'s counters went back") if fell else None


def minus(now: Counts, before: Counts) -> Counts:
    """What was counted from `before` to `now`. The counters are not read all at once: an error may come first."""
    errors = now.errors - before.errors
    return Counts(
        requests=max(now.requests - before.requests, errors),
        errors=errors,
        latency=tuple(new - old for new, old in zip(now.latency, before.latency, strict=True)),
        scores=tuple(new - old for new, old in zip(now.scores, before.scores, strict=True)),
        epoch=now.epoch,
    )


def of_drift(drift: Drift) -> str:
    """What is wrong with a comparison of windows; nothing if empty."""
    if not (_is_count(drift.rows_stable) and _is_count(drift.rows_candidate)):
        return f"windows have {drift.rows_stable!r} and {drift.rows_candidate!r} rows"
    if not all(each is None or _is_count(each) for each in (drift.requests_stable, drift.requests_candidate)):
        return f"windows are of {drift.requests_stable!r} and {drift.requests_candidate!r} requests"
    if not (drift.newest is None or _is_number(drift.newest)):
        return f"newest row is of the time {drift.newest!r}"
    if not drift.columns:
        return "no column was compared"
    if not (_is_share(drift.p_value_max) and _is_share(drift.p_value_least)):
        return f"p-value is {drift.p_value_max!r}, where {drift.p_value_least!r} is the least"
    for column in drift.columns:
        shares = (column.missing_stable, column.missing_candidate, column.p_value)
        if not all(_is_share(share) for share in shares):
            return f"column '{column.column}' has shares or a p-value of {shares}"
        high = column.high
        known = _is_number(column.statistic) and column.statistic >= 0
        if not known or not (high is None or (_is_number(high) and high >= column.statistic)):
            return f"column '{column.column}' has a distance of {column.statistic!r}, at most {high!r}"
        error, bias = column.error, column.bias
        if not (_is_number(bias) and bias >= 0 and (error is None or (_is_number(error) and error >= 0))):
            return f"column '{column.column}' has a standard error of {error!r} and a bias of {bias!r}"
    return ""


def of_pairs(pairs: Pairs) -> str:
    """What is wrong with the count of pairs; nothing if empty."""
    if not (_is_count(pairs.compared) and _is_count(pairs.differing)):
        return f"pairs are {pairs.compared!r}, {pairs.differing!r} of them differing"
    if pairs.differing > pairs.compared:
        return f"pairs are {pairs.compared}, but {pairs.differing} of them differ"
    return ""


def of_outcomes(outcomes: Outcomes) -> str:
    """What is wrong with the sums over labelled answers; nothing if empty."""
    if not _is_number(outcomes.since):
        return f"beginning is {outcomes.since!r}, not a time"
    if not _is_count(outcomes.waiting):
        return f"unlabelled answers are {outcomes.waiting!r}"
    for name, least in (("pairs", -1.0), ("candidate", 0.0), ("stable", 0.0)):
        sums: Sums = getattr(outcomes, name)
        n, total, squares = sums.n, sums.total, sums.squares
        known = _is_count(n) and _is_number(total) and _is_number(squares)
        slack = 1e-6 * (1.0 + n) if known else 0.0  # sums are rounded
        if not known or not (least * n - slack <= total <= n + slack and total**2 / max(n, 1) - slack <= squares):
            return f"sums ({name}) are {n!r}, {total!r} and {squares!r}"
        if squares > n + slack:
            return f"sums ({name}) are {n!r}, {total!r} and {squares!r}"
    return ""


def _wrong(counts: Counts) -> str:
    for name in ("requests", "errors"):
        value = getattr(counts, name)
        if not _is_count(value):
            return f"{name} are {value!r}, not a number of events"
    if counts.errors > 1.1 * counts.requests + _IN_FLIGHT:
        return f"errors ({counts.errors}) are more than its requests ({counts.requests})"
    for name, edges in (("latency", LATENCY_EDGES_MS), ("scores", SCORE_EDGES)):
        buckets: Sequence[Any] = getattr(counts, name)
        if len(buckets) not in (0, len(edges) + 1):
            return f"{name} histogram has {len(buckets)} buckets, not {len(edges) + 1}"
        bad = next((bucket for bucket in buckets if not _is_count(bucket)), None)
        if bad is not None:
            return f"{name} histogram holds {bad!r}, not a number of events"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value <= 1.0
