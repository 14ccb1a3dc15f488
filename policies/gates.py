"""The questions asked of a running rollout at every look, and what may be said to each.

`look` takes the evidence of one look and what is known from the earlier ones, and returns what is known now and one
report per gate. Each gate may raise an alarm only with its share of the policy's error budget, over all looks of all
stages together; and it passes only when "worse than this stage's margin" has been ruled out with 95 % confidence.
Evidence that is missing or makes no sense is a hold or an error: it never passes anything, and never fails anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from policies import faults, labels, rates, shifts, stats
from policies.evidence import LATENCY_EDGES_MS, ColumnDrift, Counts, Drift, Evidence, Outcomes, Pairs, Sums
from policies.faults import Fault
from policies.labels import Learned
from policies.policy import Errors, Latency, Policy
from policies.rates import Rates
from policies.shifts import Paired, Shift
from policies.stats import Margin
from policies.verdict import GateReport, Verdict

REQUESTS_MIN = 20  # of either version in the stage, before anything passes
NONE_ASKED = "gates"  # reports in the place of gates where a stage asks none
_SHARE_ALPHA = 0.001  # of saying that the traffic is not split as meant, where it is


@dataclass(frozen=True)
class State:
    """What is known of one rollout so far. It is never reset, only added to. JSON-able by `dataclasses.asdict`.

    `began` is when the candidate's first request was seen, `stage` the stage of the last look and `staged` its time;
    `routed` the requests of (candidate, stable) in this canary stage, None before its second look.
    """

    at: float | None = None
    began: float | None = None
    stage: int = -1
    staged: float = 0.0
    stable: Counts | None = None
    candidate: Counts | None = None
    errors: Rates | None = None
    latency: Rates | None = None
    routed: tuple[int, int] | None = None
    shift: Shift = field(default_factory=Shift)
    paired: Paired = field(default_factory=Paired)
    learned: Learned = field(default_factory=Learned)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> State:
        """The state that `dataclasses.asdict` made, also after a detour through JSON."""

        def made(kind: Any, value: Any) -> Any:
            return None if value is None else kind(**_tuples(value))

        shift = dict(body["shift"])
        shift["seen"] = _drift(shift["seen"])
        return cls(
            **{name: body[name] for name in ("at", "began", "stage", "staged")},
            stable=made(Counts, body["stable"]),
            candidate=made(Counts, body["candidate"]),
            errors=made(Rates, body["errors"]),
            latency=made(Rates, body["latency"]),
            routed=None if body["routed"] is None else tuple(body["routed"]),
            shift=Shift(**shift),
            paired=Paired(**body["paired"]),
            learned=_learned(body["learned"]) if "learned" in body else Learned(),
        )


def evidence_from(body: Mapping[str, Any]) -> Evidence:
    """The evidence that `dataclasses.asdict` made, also after a detour through JSON."""
    return Evidence(
        at=body["at"],
        stable=None if body["stable"] is None else Counts(**_tuples(body["stable"])),
        candidate=None if body["candidate"] is None else Counts(**_tuples(body["candidate"])),
        drift=_drift(body.get("drift")),
        pairs=None if body.get("pairs") is None else Pairs(**body["pairs"]),
        outcomes=_outcomes(body.get("outcomes")),
        problems=dict(body.get("problems") or {}),
    )


def _outcomes(body: Mapping[str, Any] | None) -> Outcomes | None:
    if body is None:
        return None
    sums = {name: Sums(**body[name]) for name in ("pairs", "candidate", "stable")}
    return Outcomes(since=body["since"], waiting=body["waiting"], **sums)


def _learned(body: Mapping[str, Any]) -> Learned:
    sums = {name: Sums(**body[name]) for name in ("pairs", "candidate", "stable")}
    spare = Sums(**body["spare"][0]), Sums(**body["spare"][1])
    return Learned(**{**_tuples(body), **sums, "spare": spare, "last": _outcomes(body["last"])})


def _drift(body: Mapping[str, Any] | None) -> Drift | None:
    if body is None:
        return None
    return Drift(**{**body, "columns": tuple(ColumnDrift(**column) for column in body["columns"])})


def _tuples(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in body.items()}


# ---------------------------------------------------------------- what a policy asks


def rungs(policy: Policy) -> int:
    """How many stages ask for a pass: those of the policy, and the watch."""
    return len(policy.rollout.stages) + 1


def tolerated(gate: Errors | Latency) -> Margin:
    """The gate's final margin."""
    if isinstance(gate.margin, str):
        return Margin(float(gate.margin.removesuffix("x")), gate.floor)
    return Margin(1.0, gate.margin)


def margins(policy: Policy, gate: Errors | Latency) -> tuple[Margin, ...]:
    """The margin per stage: a ladder down to the final one, which the last stage and the watch are held to."""
    final = tolerated(gate)
    return tuple(final.times(factor) for factor in factors(policy))


def factors(policy: Policy) -> tuple[float, ...]:
    """How much wider than the final margin each stage's is; the last stage and the watch are held to the final one."""
    return (*stats.factors(len(policy.rollout.stages)), 1.0)


def alpha(policy: Policy) -> float:
    """The chance of a false alarm that each gate has: its share of the error budget."""
    gates = policy.rollout.gates
    named = (gates.errors, gates.latency, gates.drift, gates.disagreement, gates.quality)
    asked = sum(gate is not None for gate in named)
    return policy.rollout.error_budget / max(asked, 1)


# ---------------------------------------------------------------- a look


def begin(policy: Policy) -> State:
    """Nothing is known yet."""
    gates = policy.rollout.gates
    return State(
        errors=rates.begin(rungs(policy)) if gates.errors else None,
        latency=rates.begin(rungs(policy)) if gates.latency else None,
    )


def look(policy: Policy, stage: int, state: State, evidence: Evidence) -> tuple[State, tuple[GateReport, ...]]:
    """What is known with this evidence, and what each gate says.

    `stage` is the index of the stage in the policy, or their number while a promoted candidate is watched.
    Raises ValueError for a stage that the policy does not have, or that lies before the last look's.
    """
    if not max(state.stage, 0) <= stage < rungs(policy):
        raise ValueError(f"stage {stage} does not follow stage {state.stage} of {rungs(policy)}")
    clock = faults.of_clock(state.at, evidence.at)
    if clock is not None:
        return _on_new_clock(state, evidence.at) if clock.begin_anew else state, _all(policy, stage, clock)
    if stage > state.stage:
        state = _enter(state, stage, evidence.at)
    state = replace(state, at=evidence.at)
    state, difference = _difference(policy, state, evidence)
    if isinstance(difference, Fault):
        counted: tuple[GateReport, ...] = tuple(difference.report(gate) for gate in _counting(policy))
    else:
        state, counted = _count(policy, stage, state, *difference)
    state, others = _compare(policy, stage, state, evidence)
    if not asked(policy, stage):
        others = (
            *others,
            GateReport(NONE_ASKED, Verdict.HOLD, "none is asked in this stage: only a person's word passes it"),
        )
    return state, (*counted, *others)


def _on_new_clock(state: State, at: float) -> State:
    """The state on a clock that went back: what was counted stays, times are compared again from here on."""
    began = None if state.began is None else min(state.began, at)
    return replace(state, at=at, began=began, staged=min(state.staged, at), stable=None, candidate=None)


def _all(policy: Policy, stage: int, fault: Fault) -> tuple[GateReport, ...]:
    """Every gate that this stage asks reports the fault."""
    return tuple(fault.report(name) for name in asked(policy, stage))


def asked(policy: Policy, stage: int) -> tuple[str, ...]:
    """The gates that must pass for this stage to pass. With none it cannot, whatever else is reported."""
    names = _counting(policy)
    if policy.rollout.gates.drift is not None:
        names = (*names, "drift")
    if policy.rollout.gates.disagreement is not None and _is_paired(policy, stage):
        names = (*names, "disagreement")
    if _asks_quality(policy, stage):
        names = (*names, "quality")
    return names


def _counting(policy: Policy) -> tuple[str, ...]:
    gates = policy.rollout.gates
    return tuple(name for name, gate in (("errors", gates.errors), ("latency", gates.latency)) if gate is not None)


def _is_paired(policy: Policy, stage: int) -> bool:
    """Whether both versions answer the same requests: in a shadow stage, and in the watch."""
    stages = policy.rollout.stages
    return stages[stage].shadow is not None if stage < len(stages) else policy.rollout.watch.shadow > 0


def _are_both_asked(policy: Policy, stage: int) -> bool:
    """Whether both versions get requests in the stage."""
    return stage < len(policy.rollout.stages) or policy.rollout.watch.shadow > 0


def _asks_quality(policy: Policy, stage: int) -> bool:
    """Whether the labels must show that the candidate is no worse: before promotion, in the last stage."""
    gate = policy.rollout.gates.quality
    return gate is not None and gate.required and stage == len(policy.rollout.stages) - 1


def _enter(state: State, stage: int, at: float) -> State:
    fresh = state.stage < 0
    return replace(
        state,
        stage=stage,
        staged=at,
        errors=state.errors if fresh or state.errors is None else rates.plain(rates.enter_stage(state.errors)),
        latency=state.latency if fresh or state.latency is None else rates.plain(rates.enter_stage(state.latency)),
        routed=None,
        shift=shifts.enter_stage(state.shift),
        paired=shifts.enter_stage_paired(state.paired),
        learned=labels.enter_stage(state.learned),
    )


def _difference(policy: Policy, state: State, evidence: Evidence) -> tuple[State, tuple[Counts, Counts] | Fault]:
    """What both versions counted since the last look, as (candidate, stable); or why it cannot be said."""
    fault = faults.of_counts(evidence)
    if fault is not None:
        return state, fault
    candidate, stable = evidence.candidate, evidence.stable
    assert candidate is not None
    assert stable is not None
    before = state.candidate, state.stable
    if candidate.requests > 0 and state.began is None:
        state = replace(state, began=evidence.at)
    state = replace(state, candidate=candidate, stable=stable)
    if before[0] is None or before[1] is None:
        return state, Fault(Verdict.HOLD, "first reading of the counters")
    reset = faults.of_change(before[0], candidate, "candidate") or faults.of_change(before[1], stable, "stable version")
    if reset is not None:
        return state, reset
    if state.began is None:
        return state, Fault(Verdict.HOLD, "the candidate has had no request yet")
    left = state.began + policy.rollout.burn_in - evidence.at
    if left > 0:
        return state, Fault(Verdict.HOLD, f"burn-in: what happens in the next {math.ceil(left)} s does not count")
    return state, (faults.minus(candidate, before[0]), faults.minus(stable, before[1]))


def _count(
    policy: Policy, stage: int, state: State, candidate: Counts, stable: Counts
) -> tuple[State, tuple[GateReport, ...]]:
    """The gates on rates, and whether the traffic is split as meant."""
    reports: list[GateReport] = []
    gates = policy.rollout.gates
    if gates.errors is not None and state.errors is not None:
        events = (candidate.requests, candidate.errors, stable.requests, stable.errors)
        known, report = _judge(policy, stage, gates.errors, "errors", state.errors, events)
        state = replace(state, errors=known)
        reports.append(report)
    if gates.latency is not None and state.latency is not None:
        events = (*_slow(candidate, gates.latency.slo_ms), *_slow(stable, gates.latency.slo_ms))
        known, report = _judge(policy, stage, gates.latency, "latency", state.latency, events)
        state = replace(state, latency=known)
        reports.append(report)
    stages = policy.rollout.stages
    canary = stages[stage].canary if stage < len(stages) else None
    if canary is not None:
        # The first difference of a stage reaches back into the stage before it.
        c, s = state.routed or (0, 0)
        known_share = (0, 0) if state.routed is None else (c + candidate.requests, s + stable.requests)
        state = replace(state, routed=known_share)
        reports.append(_routed(canary.weight / 100.0, *known_share))
    return state, tuple(reports)


def _slow(counts: Counts, slo_ms: float) -> tuple[int, int]:
    """(requests timed, those slower than the first histogram edge at or beyond the SLO)."""
    within = sum(edge < slo_ms for edge in LATENCY_EDGES_MS) + 1
    return sum(counts.latency), sum(counts.latency[within:])


def _judge(
    policy: Policy, stage: int, gate: Errors | Latency, name: str, known: Rates, events: tuple[int, int, int, int]
) -> tuple[Rates, GateReport]:
    """One more tick of one comparison of rates, and what it comes to."""
    n_c, k_c, n_s, k_s = events
    ladder = margins(policy, gate)
    known = rates.plain(rates.tick(known, n_c, k_c, n_s, k_s, stage, ladder, gate.cluster))
    worse = float(rates.log_worse(known, rungs(policy)))
    no_worse = float(rates.log_no_worse(known, stage))
    alarm_at, pass_at = -math.log(alpha(policy)), -math.log(1.0 - rates.CONFIDENCE)
    enough = min(known.stage_n_c, known.stage_n_s) >= REQUESTS_MIN
    verdict, needs = Verdict.HOLD, ""
    if worse >= alarm_at and bool(rates.beyond_half(known, ladder[-1])):
        verdict = Verdict.FAIL
    elif no_worse >= pass_at and enough and n_c > 0:
        verdict = Verdict.PASS
    elif no_worse >= pass_at and enough:
        needs = "a request to the candidate since the last look"
    else:
        needs = _needs(known, ladder[stage], pass_at - no_worse)
    return known, _report(name, verdict, known, ladder[stage], worse, alpha(policy), needs)


def _needs(known: Rates, margin: Margin, missing: float) -> str:
    """How many more requests it would take, were both versions alike."""
    lacking = REQUESTS_MIN - min(known.stage_n_c, known.stage_n_s)
    total = known.n_c + known.n_s
    if known.n_c <= 0 or known.n_s <= 0:
        return f"at least {REQUESTS_MIN} requests to each version"
    rate = (known.k_c + known.k_s + 0.25) / (total + 50.0)
    gain = rates.growth(rate, known.n_c / total, margin)
    more = max(missing / gain if gain > 0 else math.inf, lacking)
    return f"about {more:,.0f} more requests to the candidate" if more < 1e9 else "events to compare"


def _report(
    name: str, verdict: Verdict, known: Rates, margin: Margin, worse: float, share: float, needs: str
) -> GateReport:
    rate_c = known.k_c / known.n_c if known.n_c else 0.0
    rate_s = known.k_s / known.n_s if known.n_s else 0.0
    low, high = stats.difference_interval(known.n_c, known.k_c, known.n_s, known.k_s, 1.0 - rates.CONFIDENCE)
    threshold = float(margin.beyond(rate_s)) - rate_s
    what = {"errors": "errors", "latency": "slow requests"}[name]
    says = f"{what} {rate_c:.2%} against {rate_s:.2%} (n {known.n_c:,.0f}): " + _words(verdict, margin)
    if verdict is Verdict.FAIL:
        says += f"; chance that this is an accident: below {share:.2g}"
    return GateReport(
        gate=name, verdict=verdict, says=says, statistic=math.exp(min(worse, 600.0)), estimate=rate_c - rate_s,
        low=low, high=high, n=int(known.n_c), threshold=threshold, unit="share of requests", needs=needs,
    )  # fmt: skip


def _words(verdict: Verdict, margin: Margin) -> str:
    limit = f"{margin.ratio:.3g} times as many" if margin.ratio > 1.0 else f"{100 * margin.shift:.3g} points"
    return {
        Verdict.PASS: f"no worse than {limit}" if margin.ratio > 1.0 else f"no worse by {limit}",
        Verdict.FAIL: "worse",
    }.get(verdict, f"{limit} worse is not ruled out yet")


def _routed(weight: float, candidate: int, stable: int) -> GateReport:
    """Whether the candidate gets its share of the requests. A different share makes the comparison doubtful: a hold."""
    total = candidate + stable
    if total == 0:
        return GateReport("traffic", Verdict.HOLD, "no request in this stage yet", threshold=weight)
    share = candidate / total
    odds = (candidate + 0.5) / (stable + 0.5) * (1.0 - weight) / weight
    differs = float(stats.share_differs(total, candidate, weight)) >= -math.log(_SHARE_ALPHA)
    wrong = differs and not 0.5 <= odds <= 2.0
    says = f"{share:.1%} of {total:,} requests went to the candidate where {weight:.0%} were meant"
    if wrong:
        return GateReport(
            "traffic", Verdict.HOLD, says + ": not comparable", estimate=share, n=candidate, threshold=weight,
            unit="share of requests", needs="requests shared out as the stage says",
        )  # fmt: skip
    return GateReport(
        "traffic", Verdict.PASS, says, estimate=share, n=candidate, threshold=weight, unit="share of requests"
    )


def _compare(policy: Policy, stage: int, state: State, evidence: Evidence) -> tuple[State, tuple[GateReport, ...]]:
    """The gates on sampled rows and their labels."""
    reports: list[GateReport] = []
    gates, stages = policy.rollout.gates, policy.rollout.stages
    share = alpha(policy)
    if gates.drift is not None:
        length = stages[stage].length_s if stage < len(stages) else policy.rollout.watch.length
        began = state.staged if _are_both_asked(policy, stage) else None
        scene = shifts.Scene(evidence.at - state.staged, length, rungs(policy), factors(policy)[stage], share, began)
        shift, report = shifts.look(gates.drift, state.shift, scene, evidence.drift, evidence.problems.get("drift"))
        state = replace(state, shift=shift)
        reports.append(report)
    if gates.disagreement is not None and _is_paired(policy, stage):
        problem = evidence.problems.get("pairs")
        paired, report = shifts.look_paired(
            gates.disagreement, state.paired, factors(policy)[stage], share, evidence.pairs, problem
        )
        state = replace(state, paired=paired)
        reports.append(report)
    if gates.quality is not None:
        required = _asks_quality(policy, stage)
        problem = evidence.problems.get("labels")
        learned, said = labels.look(gates.quality, state.learned, share, required, evidence.outcomes, problem)
        state = replace(state, learned=learned)
        if said is not None:
            reports.append(said)
    return state, tuple(reports)


# ---------------------------------------------------------------- in words


def summary(reports: Sequence[GateReport]) -> str:
    """One line for people: what each gate said."""
    return "; ".join(_line(report) for report in reports) or "no gate was asked"


def _line(report: GateReport) -> str:
    named = report.says if report.says.startswith(report.gate) else f"{report.gate}: {report.says}"
    return f"{named} (needs {report.needs})" if report.needs else named


def to_dict(state: State) -> dict[str, Any]:
    """The state as JSON-able values."""
    return asdict(state)


def verdicts(reports: Iterable[GateReport]) -> dict[str, Verdict]:
    """Each gate's verdict by name."""
    return {report.gate: report.verdict for report in reports}
