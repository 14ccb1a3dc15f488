"""Broken evidence of every kind, for every gate, in front of a rollout that is about to pass.

`looks` gives a state and the looks to come. Whatever is drawn, none of them may pass and none may fail.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace
from typing import Any

from policies import gates
from policies.evidence import LATENCY_EDGES_MS, ColumnDrift, Counts, Drift, Evidence, Outcomes, Pairs, Sums
from policies.gates import State
from policies.policy import Policy
from policies.policy_yaml import parse
from policies.verdict import GateReport, Verdict, worst

GATES = ("errors", "latency", "drift", "disagreement", "quality")
KINDS = (
    "no data", "stale", "NaN", "infinite", "empty", "counter reset", "negative", "one arm only",
    "below the minimum", "source error", "source time-out", "clock going back",
)  # fmt: skip
_BUCKETS = len(LATENCY_EDGES_MS) + 1

POLICY: Policy = parse(
    """
policy: faulty
rollout:
  burn_in: 0s
  stages:
    - shadow: {share: 0.5, for: 60s}
    - shadow: {share: 1.0, for: 60s}
  gates:
    errors: {margin: 0.02}
    latency: {slo_ms: 20, margin: 0.03}
    drift: {rows_min: 500}
    disagreement: {margin: 0.05}
    quality: {margin: 0.05}
"""
)


def counts(requests: Any, errors: Any = 0, slow: Any = 0, epoch: str = "a") -> Counts:
    latency = [0] * _BUCKETS
    latency[10], latency[60] = requests, slow
    return Counts(requests, errors, tuple(latency), epoch=epoch)


def healthy(tick: int) -> Evidence:
    """What a good version looks like after so many ticks of 200 requests to each version."""
    drift = Drift(3000, 3000, (ColumnDrift("prediction", "wasserstein", 0.03, 0.5, high=0.06, error=0.01),), 0.5)
    n = 200 * tick
    labelled = Outcomes(1000.0, pairs=Sums(n, 0.0, n // 50), waiting=100)
    return Evidence(1000.0 + tick, counts(n), counts(n), drift, Pairs(n, n // 500), outcomes=labelled)


@functools.cache
def about_to_pass(last_stage: int) -> State:
    """A good version's state at its 40th tick, in the stage, every gate passing; ten ticks of it in that stage."""
    state = gates.begin(POLICY)
    for tick in range(41):
        stage = last_stage if tick > 30 else 0
        state, reports = gates.look(POLICY, stage, state, healthy(tick))
    assert worst(report.verdict for report in reports) is Verdict.PASS, gates.summary(reports)
    return state


@dataclass(frozen=True)
class Case:
    """A state, and the looks that follow it in a stage."""

    state: State
    stage: int
    looks: tuple[Evidence, ...]

    def verdicts(self, gate: str) -> list[tuple[Verdict, Verdict]]:
        """(of all gates together, of the gate) for each look."""
        state, found = self.state, []
        for evidence in self.looks:
            state, reports = gates.look(POLICY, self.stage, state, evidence)
            found.append((worst(r.verdict for r in reports), _of(gate, reports)))
        return found


def _of(gate: str, reports: tuple[GateReport, ...]) -> Verdict:
    return next(report.verdict for report in reports if report.gate == gate)


def case(gate: str, kind: str, draw: random.Random, longest: int = 29) -> Case:
    """One case of the kind of fault for the gate, of `longest` looks at most."""
    if kind == "clock going back":
        back = draw.choice([0.001, 1.0, 3600.0, 1e9])
        return Case(about_to_pass(1), 1, (replace(healthy(41), at=1040.0 - back),))
    if kind in ("source error", "source time-out"):
        source = {"drift": "drift", "disagreement": "pairs", "quality": "labels"}.get(gate, "counts")
        text = "HTTP 500" if kind == "source error" else f"no answer after {draw.randint(1, 30)} s"
        looks = tuple(replace(healthy(41 + i), problems={source: text}) for i in range(draw.randint(1, longest)))
        if source == "counts" and draw.random() < 0.5:
            looks = tuple(replace(look, stable=None, candidate=None, drift=None, pairs=None) for look in looks)
        return Case(about_to_pass(1), 1, looks)
    if gate in ("errors", "latency"):
        return _counted(gate, kind, draw, longest)
    return _labelled(kind, draw, longest) if gate == "quality" else _compared(gate, kind, draw, longest)


def _counted(gate: str, kind: str, draw: random.Random, longest: int) -> Case:
    state, good = about_to_pass(1), healthy(41)
    arm = draw.choice(["stable", "candidate"])
    was: Counts = getattr(good, arm)
    value: Any = {"NaN": float("nan"), "infinite": draw.choice([1, -1]) * float("inf")}.get(kind, -draw.randint(1, 99))
    if kind in ("NaN", "infinite", "negative"):
        return Case(state, 1, (replace(good, **{arm: _spoilt(gate, was, value, draw)}),))
    if kind == "no data":
        return Case(state, 1, tuple(replace(healthy(41 + i), **{arm: None}) for i in range(draw.randint(1, longest))))
    if kind == "stale":
        return Case(state, 1, tuple(replace(healthy(40), at=1041.0 + i) for i in range(draw.randint(1, longest))))
    if kind == "empty":
        empty = draw.choice([Counts(0, 0), counts(0), Counts(was.requests, 0, ()), replace(was, latency=(1, 2))])
        return Case(state, 1, (replace(good, **{arm: empty}),))
    if kind == "counter reset":
        n = draw.randint(0, 8000)
        begun = counts(n, draw.randint(0, n), draw.randint(0, n), epoch=draw.choice(["a", "b"]))
        if begun.epoch == "a":
            begun = replace(begun, requests=min(n, 7999), errors=min(begun.errors, 7999))
        return Case(state, 1, (replace(good, **{arm: begun}),))
    if kind == "one arm only":
        # From the start, the other version has never had a request.
        looks = []
        for tick in range(1 + draw.randint(1, longest)):
            n = tick * draw.randint(1, 1000)
            seen = {arm: counts(n), {"stable": "candidate", "candidate": "stable"}[arm]: counts(0)}
            looks.append(replace(healthy(tick), **seen))
        return Case(gates.begin(POLICY), 1, _growing(looks))
    assert kind == "below the minimum"
    most = draw.randint(1, 19)
    size = min(20, longest)
    looks = [
        replace(healthy(tick), stable=counts(1000 * tick), candidate=counts(most * tick // size))
        for tick in range(size)
    ]
    return Case(gates.begin(POLICY), 1, tuple(looks))


def _growing(looks: list[Evidence]) -> tuple[Evidence, ...]:
    """Sorted so that the counters never fall."""
    arms = [sorted((getattr(look, arm) for look in looks), key=lambda c: c.requests) for arm in ("stable", "candidate")]
    return tuple(replace(look, stable=s, candidate=c) for look, s, c in zip(looks, *arms, strict=True))


def _spoilt(gate: str, was: Counts, value: Any, draw: random.Random) -> Counts:
    if gate == "errors":
        return replace(was, **{draw.choice(["requests", "errors"]): value})
    at = draw.randrange(_BUCKETS)
    return replace(was, latency=(*was.latency[:at], value, *was.latency[at + 1 :]))


def _labelled(kind: str, draw: random.Random, longest: int) -> Case:
    state, good = about_to_pass(1), healthy(41)
    n = 200 * 41
    if kind in ("no data", "stale"):
        # In a new stage, no label has come yet, or only those that were there before.
        old = None if kind == "no data" else healthy(40).outcomes
        looks = tuple(replace(good, at=1041.0 + i, outcomes=old) for i in range(draw.randint(1, longest)))
        return Case(about_to_pass(0), 1, looks)
    few = draw.randint(1, 199)
    seen = {
        "empty": Outcomes(1000.0),
        "counter reset": Outcomes(1000.0, pairs=Sums(draw.randint(0, 7999), 0.0, 0.0)),
        "one arm only": Outcomes(1000.0, **{draw.choice(["stable", "candidate"]): Sums(n, n // 10, n // 10)}),
        "below the minimum": Outcomes(1000.0, pairs=Sums(few, 0.0, 0.0), waiting=draw.randint(0, 10**6)),
    }.get(kind)
    if seen is not None:
        start = state if kind == "counter reset" else gates.begin(POLICY)
        return Case(start, 1, (replace(good, outcomes=seen),))
    value: Any = {"NaN": float("nan"), "infinite": draw.choice([1, -1]) * float("inf")}.get(kind, -draw.randint(1, 99))
    field = draw.choice(["n", "squares"] if kind == "negative" else ["n", "total", "squares"])
    arm = draw.choice(["pairs", "stable", "candidate"])
    sums = replace(Sums(n, 0.0, 10.0), **{field: value})
    assert good.outcomes is not None
    return Case(state, 1, (replace(good, outcomes=replace(good.outcomes, **{arm: sums})),))


def _compared(gate: str, kind: str, draw: random.Random, longest: int) -> Case:
    before, state, good = about_to_pass(0), about_to_pass(1), healthy(41)
    name = {"drift": "drift", "disagreement": "pairs"}[gate]
    if kind in ("no data", "stale"):
        # In a new stage, nothing has come yet, or only what was there before.
        old = replace(good, **{name: None if gate == "drift" or kind == "no data" else healthy(40).pairs})
        return Case(before, 1, tuple(replace(old, at=1041.0 + i) for i in range(draw.randint(1, longest))))
    value: Any = {"NaN": float("nan"), "infinite": draw.choice([1, -1]) * float("inf")}.get(kind, -draw.randint(1, 99))
    if gate == "disagreement":
        n = 200 * 41
        pairs = {
            "empty": Pairs(0, 0),
            "counter reset": Pairs(draw.randint(0, 7000), 0),
            "one arm only": Pairs(0, 0),
            "below the minimum": Pairs(draw.randint(1, 5), 0),
        }.get(kind) or draw.choice([Pairs(value, 0), Pairs(n, value), Pairs(draw.randint(1, 9), 10)])
        start = gates.begin(POLICY) if kind in ("one arm only", "below the minimum", "empty") else state
        return Case(start, 1, (replace(good, pairs=pairs),))
    assert good.drift is not None
    column = good.drift.columns[0]
    rows = draw.randint(0, 499)
    few = replace(good.drift, rows_candidate=rows, rows_stable=draw.choice([rows, 3000]))
    field = draw.choice(["statistic", "p_value", "missing_stable", "missing_candidate", "high", "error", "bias"])
    broken = {
        "empty": replace(good.drift, columns=()),
        "counter reset": few,
        "one arm only": replace(good.drift, **{draw.choice(["rows_stable", "rows_candidate"]): 0}),
        "below the minimum": few,
    }.get(kind) or draw.choice(
        [
            replace(good.drift, columns=(replace(column, **{field: value}),)),
            replace(good.drift, p_value_max=value),
            replace(good.drift, rows_candidate=value),
        ]
    )
    return Case(state, 1, (replace(good, drift=broken),))
