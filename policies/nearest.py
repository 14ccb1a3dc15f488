"""What would have changed a gate's word: the nearest value of what was seen at a look, all else as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from policies import gates
from policies.evidence import LATENCY_EDGES_MS, Counts, Evidence, Sums
from policies.gates import State
from policies.policy import Policy
from policies.verdict import GateReport, Verdict

_STEP = 1e-4  # of a mean loss
_STEPS_MAX = round(2.0 / _STEP)  # differences of losses are from -1 to 1


def nearest(policy: Policy, stage: int, before: State, evidence: Evidence, report: GateReport) -> str:
    """The value nearest to the seen one with which the gate would have said something else, as a sentence.

    `before` is what was known before this look. Counts and losses are varied within this look and judged anew by the
    gate itself; for the other gates it is the value that the report's number was held against.
    """
    if report.verdict is Verdict.ERROR:
        return "evidence that can be read, and can be true"
    if report.gate in ("errors", "latency"):
        return _counted(policy, stage, before, evidence, report)
    if report.gate == "disagreement" and evidence.pairs is not None:
        return _differing(policy, stage, before, evidence, report)
    if report.gate == "quality":
        return _labelled(policy, stage, before, evidence, report)
    return _held_against(report)


def of_check(report: GateReport) -> str:
    """The same for a check before any traffic, from its numbers: the limit, or else the estimate, that was held
    against the threshold, and the side on which the word is another one. Nothing where there was no threshold."""
    if report.verdict is Verdict.ERROR:
        return "evidence that can be read, and can be true"
    bar, low, high = report.threshold, report.low, report.high
    if report.verdict is Verdict.HOLD or bar is None:
        return report.needs
    if low is not None and low >= bar:
        return f"a lower limit below {bar:.4g} instead of {low:.4g} ({report.unit})"
    if high is not None and high <= bar:
        return f"an upper limit above {bar:.4g} instead of {high:.4g} ({report.unit})"
    if report.estimate is None:
        return report.needs
    side = "below" if report.estimate > bar else "above"
    return f"a value {side} {bar:.4g} instead of {report.estimate:.4g} ({report.unit})"


def _held_against(report: GateReport) -> str:
    if report.gate == "traffic" and report.verdict is Verdict.PASS and report.threshold is not None:
        odds = report.threshold / (1.0 - report.threshold)
        low, high = (times * odds / (1.0 + times * odds) for times in (0.5, 2.0))
        return f"a share below {low:.1%} or above {high:.1%}, shown beyond chance"
    if report.verdict is Verdict.HOLD or report.threshold is None:
        return report.needs
    if report.gate == "drift" and report.verdict is Verdict.FAIL:
        if report.low is None or report.low <= report.threshold:
            return "no more missing values than the stable version's"
        return f"a lower limit up to {report.threshold:.4g} instead of {report.low:.4g} ({report.unit})"
    sign = "below" if report.verdict is Verdict.FAIL else "at or above"
    if report.verdict is Verdict.PASS and report.high is not None:
        return f"an upper limit {sign} {report.threshold:.4g} instead of {report.high:.4g} ({report.unit})"
    seen = "" if report.estimate is None else f" instead of {report.estimate:.4g}"
    return f"a value {sign} {report.threshold:.4g}{seen} ({report.unit})"


def _counted(policy: Policy, stage: int, before: State, evidence: Evidence, report: GateReport) -> str:
    candidate, last = evidence.candidate, before.candidate
    if candidate is None or last is None or candidate.epoch != last.epoch:
        return report.needs
    if report.gate == "errors":
        low, seen, high = last.errors, candidate.errors, last.errors + candidate.requests - last.requests
        what = "errors"
    else:
        gate = policy.rollout.gates.latency
        assert gate is not None
        within = sum(edge < gate.slo_ms for edge in LATENCY_EDGES_MS) + 1
        low, seen = sum(last.latency[within:]), sum(candidate.latency[within:])
        high = low + sum(candidate.latency) - sum(last.latency)
        what = "slow requests"

    def verdict(value: int) -> Verdict:
        made = replace(candidate, errors=value) if report.gate == "errors" else _slower(candidate, within, value - seen)
        return _said(policy, stage, before, replace(evidence, candidate=made), report.gate)

    found = _search(verdict, low, seen, high)
    if found is None:
        return report.needs or f"no number of {what} at this look alone: the looks before had decided it"
    return f"{found - low:,} {what} of the candidate at this look instead of {seen - low:,}: {verdict(found)}"


def _slower(counts: Counts, within: int, more: int) -> Counts:
    """The counts with so many more requests beyond the SLO (fewer, if negative), moved bucket by bucket."""
    latency = list(counts.latency)
    giving, taking = (range(within), within) if more > 0 else (range(within, len(latency)), 0)
    left = abs(more)
    for bucket in giving:
        moved = min(latency[bucket], left)
        latency[bucket] -= moved
        latency[taking] += moved
        left -= moved
    return replace(counts, latency=tuple(latency))


def _differing(policy: Policy, stage: int, before: State, evidence: Evidence, report: GateReport) -> str:
    pairs = evidence.pairs
    assert pairs is not None
    low = int(before.paired.last_differing)
    high = low + pairs.compared - int(before.paired.last_compared)

    def verdict(value: int) -> Verdict:
        made = replace(evidence, pairs=replace(pairs, differing=value))
        return _said(policy, stage, before, made, report.gate)

    found = _search(verdict, low, pairs.differing, high)
    if found is None:
        return report.needs or "no number of other answers at this look alone: the looks before had decided it"
    return f"{found - low:,} other answers at this look instead of {pairs.differing - low:,}: {verdict(found)}"


def _labelled(policy: Policy, stage: int, before: State, evidence: Evidence, report: GateReport) -> str:
    """How much better or worse the candidate's answers would have had to be that got their labels since the look
    before: the same for each of them."""
    seen, last = evidence.outcomes, before.learned.last
    if seen is None:
        return report.needs or "no label at this look alone: the looks before had decided it"
    more = seen if last is None or last.since != seen.since else seen.minus(last)

    def verdict(steps: int) -> Verdict:
        by = _STEP * steps
        made = replace(
            seen, pairs=_moved(seen.pairs, more.pairs, by), candidate=_moved(seen.candidate, more.candidate, by)
        )
        return _said(policy, stage, before, replace(evidence, outcomes=made), report.gate)

    found = _first_other(verdict)
    if found is None:
        return report.needs or "no loss at this look alone: the looks before had decided it"
    count, word = more.pairs.n + more.candidate.n, "lower" if found < 0 else "higher"
    says = f"a mean loss {word} by {abs(found) * _STEP:.4f} on the {count:,.0f} answers that got labels at this look"
    return f"{says}: {verdict(found)}"


def _moved(sums: Sums, more: Sums, by: float) -> Sums:
    """The sums, had each of `more` among them been larger by so much."""
    return Sums(sums.n, sums.total + more.n * by, sums.squares + 2.0 * by * more.total + more.n * by * by)


def _first_other(verdict: Callable[[int], Verdict]) -> int | None:
    """The number of steps nearest to 0 with another verdict, from -2 to 2; None if there is none that could be."""
    now, found = verdict(0), []
    for sign in (-1, 1):
        same, other = 0, sign
        while verdict(other) is now and abs(other) < _STEPS_MAX:
            same, other = other, sign * min(2 * abs(other), _STEPS_MAX)
        found.append(_halved(verdict, now, same, other))
    real = [steps for steps in found if verdict(steps) not in (now, Verdict.ERROR)]  # an error: there is no such loss
    return min(real, key=abs, default=None)


def _halved(verdict: Callable[[int], Verdict], now: Verdict, same: int, other: int) -> int:
    """The value next to one with the verdict `now` that has another; from two values of which that is true."""
    while abs(other - same) > 1:
        middle = (same + other) // 2
        same, other = (middle, other) if verdict(middle) is now else (same, middle)
    return other


def _said(policy: Policy, stage: int, before: State, evidence: Evidence, gate: str) -> Verdict:
    _, reports = gates.look(policy, stage, before, evidence)
    return next((report.verdict for report in reports if report.gate == gate), Verdict.HOLD)


def _search(verdict: Callable[[int], Verdict], low: int, seen: int, high: int) -> int | None:
    """The value nearest to `seen`, from `low` to `high`, with another verdict; None if there is none at either end.

    A verdict gets no better with more events, so that each side is searched by halving.
    """
    now = verdict(seen)
    found: list[int] = []
    for end in (low, high):
        if not low <= seen <= high or verdict(end) is now:
            continue
        found.append(_halved(verdict, now, seen, end))
    return min(found, key=lambda value: abs(value - seen), default=None)
