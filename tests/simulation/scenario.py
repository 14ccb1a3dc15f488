"""What a seed stands for: a policy, versions good and bad, who wants what when, and the weather."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache

from policies.policy import Policy
from policies.policy_yaml import parse
from tests.simulation.chaos import KINDS, Weather

_STAGES = (
    "- canary: {weight: 50, for: 9s}",
    "- shadow: {share: 1.0, for: 4s}\n    - canary: {weight: 50, for: 9s}",
    "- canary: {weight: 20, for: 4s}\n    - canary: {weight: 50, for: 9s}",
)
_WATCHES = ("{for: 9s, shadow: 0.5}", "{for: 0s, shadow: 0.5}")
_TEXT = """
policy: simulated
rollout:
  stages:
    {stages}
  gates:
    errors: {{margin: 0.1}}
  watch: {watch}
  look_every: 5s
  burn_in: 0s
  patience: 60s
  grace: 20s
  lease: 15s
  on_conflict: {conflict}
  on_exhausted: {exhausted}
  pause_max: 120s
"""
PORTS = ("router", "target", "registry", "telemetry", "ledger")


_APPROVALS = """governance:
  approvals:
    {{before: {before}, by: [person-1, person-2, person-3], count: {count}, wait: 200s, on_silence: {silence}}}
"""


@cache
def policy(stages: str, watch: str, conflict: str, exhausted: str, approvals: str = "") -> Policy:
    return parse(_TEXT.format(stages=stages, watch=watch, conflict=conflict, exhausted=exhausted) + approvals)


@dataclass(frozen=True)
class Asked:
    """A delivery of a version, or what a person wants (`rollback`, `abort`, `pause`, ...), at a time."""

    at: float
    what: str
    version: str = ""


@dataclass
class Scenario:
    """Everything that chance decides before the run begins. `deaths`: any process at that time; `jumps`: (when, by)."""

    seed: int
    policy: Policy
    first: bool
    digests: dict[str, str]
    errors: dict[str, float]
    asked: list[Asked]
    weather: Weather
    outages: list[tuple[float, float]] = field(default_factory=list)
    outages_lie: bool = False  # numbers that cannot be, instead of none
    lies: float = 0.0
    deaths: list[float] = field(default_factory=list)
    jumps: list[tuple[float, float]] = field(default_factory=list)
    reconcilers: int = 1
    every: float = 10.0
    silent: bool = False
    calm: bool = False  # nothing goes wrong but outages of the telemetry, each shorter than its grace


def scenario(seed: int) -> Scenario:
    """The seed's scenario. Equal for equal seeds, on any machine."""
    chance = random.Random(seed)
    rules = (
        chance.choice(_STAGES),
        chance.choice(_WATCHES),
        chance.choice(("queue", "supersede", "reject")),
        chance.choice(("rollback", "rollback", "pause")),
    )
    calm = chance.random() < 0.15
    people = random.Random(seed + 1_000_003)  # of its own: seeds without approvals are what they were
    chosen = policy(*rules, "" if calm or people.random() < 0.8 else _asks(people))
    versions = [str(number) for number in range(2, 2 + chance.choice((1, 1, 2, 2, 3)))]
    bad = chance.random() < 0.3
    made = Scenario(
        seed=seed,
        policy=chosen,
        first=chance.random() < 0.1,
        digests={"1": "digest-1", **{v: f"digest-{v}" for v in versions}},
        errors={v: 0.5 if bad and chance.random() < 0.7 else 0.0 for v in versions},
        asked=[Asked(chance.uniform(0.0, 60.0), "deliver", v) for v in versions],
        weather=Weather(),
        reconcilers=chance.choice((1, 1, 2)),
        every=chance.choice((10.0, 10.0, 20.0)),
        silent=not calm and chance.random() < 0.05,
        calm=calm,
        outages_lie=chance.random() < 0.3,
    )
    if len(versions) > 1 and chance.random() < 0.3:
        made.digests[versions[1]] = made.digests[versions[0]]  # the same bytes under a new name
        made.errors[versions[1]] = made.errors[versions[0]]
    if calm:
        at = 0.0
        while at < 120.0 and chance.random() < 0.7:
            at += chance.uniform(0.0, 60.0)
            made.outages.append((at, at + chance.uniform(1.0, chosen.rollout.grace - chosen.rollout.look_every - 1.0)))
            at += 60.0
        return made
    if chance.random() < 0.25:
        made.asked.append(Asked(chance.uniform(1.0, 120.0), chance.choice(("abort", "promote", "pause", "resume"))))
    if chance.random() < 0.25:
        made.asked.append(Asked(chance.uniform(1.0, 150.0), "rollback"))
    _weather(made, chance)
    if chosen.governance.approvals:
        for _ in range(people.randint(0, 8)):
            what = people.choice(("approve", "approve", "approve", "approve", "refuse"))
            made.asked.append(Asked(people.uniform(10.0, 250.0), what, people.choice(("1", "2", "3", "4"))))
    return made


def _asks(people: random.Random) -> str:
    which = {"before": ("canary", "promote"), "count": (1, 2), "silence": ("rollback", "pause")}
    return _APPROVALS.format(**{name: people.choice(values) for name, values in which.items()})


def _weather(made: Scenario, chance: random.Random) -> None:
    severity = chance.choice((0.0, 0.02, 0.05, 0.15))
    if severity:
        kinds = chance.sample(KINDS, chance.randint(1, len(KINDS)))
        made.weather.rates = {kind: severity / len(kinds) for kind in kinds}
        made.weather.ports = frozenset(chance.sample(PORTS, chance.randint(1, len(PORTS))))
        made.weather.until = chance.uniform(20.0, 150.0)
    if chance.random() < 0.25:
        at = chance.uniform(0.0, 60.0)
        made.weather.down[chance.choice(PORTS)] = (at, at + chance.choice((10.0, 60.0, 200.0)))
    if chance.random() < 0.5:
        made.deaths = sorted(chance.uniform(0.0, 120.0) for _ in range(chance.randint(1, 3)))
    if chance.random() < 0.3:
        by = chance.choice((-30.0, -5.0, 5.0, 30.0, 300.0))
        made.jumps = [(chance.uniform(0.0, 100.0), by)]
    if chance.random() < 0.3:
        made.lies = chance.choice((0.05, 0.3))
    if chance.random() < 0.2:
        at = chance.uniform(0.0, 100.0)
        made.outages = [(at, at + chance.uniform(5.0, 100.0))]
