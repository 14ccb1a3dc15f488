"""A good version's rollout through the gates and the machine together, while sources of evidence are down.

`walk` plays one to its end. Whatever source is down, and however often: as long as each outage is shorter than its
grace, the version is promoted, and no look that could not look moves it on.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace

from policies import gates, rollout
from policies.events import Checked, Done, Event, Looked, Phase, Requested
from policies.evidence import Evidence
from policies.gates import State
from policies.policy_yaml import parse
from policies.rollout import Rollout
from policies.verdict import Verdict, worst
from tests.benchmarks.faulty import healthy

SOURCES = ("counts", "drift", "pairs", "labels", "all of them")
_HASTE = 20  # ticks of `healthy` traffic a second, so that short stages see enough of it
_LONGEST_S = 300

POLICY = parse(
    """
policy: outages
rollout:
  burn_in: 0s
  look_every: 1s
  patience: 2s
  grace: 6s
  stages:
    - shadow: {share: 1.0, for: 6s}
    - canary: {weight: 50, for: 6s}
  watch: {for: 6s, shadow: 1.0}
  gates:
    errors: {margin: 0.02}
    latency: {slo_ms: 20, margin: 0.03}
    drift: {rows_min: 500}
    disagreement: {margin: 0.05}
    quality: {margin: 0.05}
"""
)


@dataclass(frozen=True)
class Walk:
    """A rollout under way: the machine's state, what the gates know, the events so far; `blind_moves` are steps
    forward at looks that could not look."""

    machine: Rollout
    known: State
    events: int
    blind_moves: int = 0


def walk(draw: random.Random, source: str, longest_s: float = POLICY.rollout.grace) -> Walk:
    """A rollout to its end, with one to three outages of the source, each shorter than `longest_s`."""
    start = draw.uniform(0.0, 16.0)
    outages = []
    for _ in range(draw.randint(1, 3)):
        outages.append((start, start + draw.uniform(0.1, 0.999) * longest_s))
        start = outages[-1][1] + draw.uniform(1.0, 12.0)
    word = draw.choice(["HTTP 500", f"no answer after {draw.randint(1, 30)} s", "connection refused"])
    first = int(outages[0][0])
    made = _undisturbed()[min(first, len(_undisturbed()) - 1)]
    for second in range(min(first, len(_undisturbed()) - 1), _LONGEST_S):
        if made.machine.ended:
            return made
        down = any(begin <= second < end for begin, end in outages)
        made = _look(made, second, _without(second, source, word) if down else _seen(second))
    raise AssertionError(f"the rollout did not end in {_LONGEST_S} s: {made.machine.label}")


@functools.cache
def _undisturbed() -> tuple[Walk, ...]:
    """The rollout before each of its seconds, nothing being down."""
    number, at = 1, 1000.0
    asked = Requested(at, number, "m", "2", "digest", "1", rollout.terms(POLICY))
    machine, _ = rollout.step(None, asked)
    made = _done(_event(Walk(machine, gates.begin(POLICY), number), Checked(at, 2, Verdict.PASS, "")), at)
    found = [made]
    while not made.machine.ended:
        made = _look(made, len(found) - 1, _seen(len(found) - 1))
        found.append(made)
    assert made.machine.phase is Phase.PROMOTED, made.machine
    return tuple(found)


def _look(made: Walk, second: int, evidence: Evidence) -> Walk:
    stage = len(POLICY.rollout.stages) if made.machine.phase is Phase.WATCHING else made.machine.stage
    known, reports = gates.look(POLICY, stage, made.known, evidence)
    verdict = worst(report.verdict for report in reports)
    before = made.machine
    made = _event(replace(made, known=known), Looked(evidence.at, made.events + 1, verdict, gates.summary(reports)))
    moved = made.machine.moved_by != before.moved_by and made.machine.phase is not Phase.ROLLING_BACK
    if moved and verdict is Verdict.ERROR:
        made = replace(made, blind_moves=made.blind_moves + 1)
    return _done(made, evidence.at)


def _done(made: Walk, at: float) -> Walk:
    """What the machine waits for is carried out at once."""
    while made.machine.pending:
        made = _event(made, Done(at, made.events + 1, made.machine.pending[0].id))
    return made


def _event(made: Walk, event: Event) -> Walk:
    machine, _ = rollout.step(made.machine, event)
    return replace(made, machine=machine, events=event.number)


def _seen(second: int) -> Evidence:
    return replace(healthy(_HASTE * (second + 1)), at=1000.0 + second)


def _without(second: int, source: str, word: str) -> Evidence:
    names = SOURCES[:-1] if source == SOURCES[-1] else (source,)
    seen = replace(_seen(second), problems=dict.fromkeys(names, word))
    fields = {"counts": ("stable", "candidate"), "drift": ("drift",), "pairs": ("pairs",), "labels": ("outcomes",)}
    return replace(seen, **{field: None for name in names for field in fields[name]})
