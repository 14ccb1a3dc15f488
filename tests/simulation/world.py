"""One run of the simulation: the real flows, controllers and reconcilers on fakes of all ports, on virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flows import approval
from flows.deliver import to_the_end
from flows.delivery import Delivery
from flows.orders import order
from flows.reconcile import reconcile_with
from flows.rollback import take_back
from flows.rollout import Checks, Controller, Progress
from flows.turn import refuse_pointless, start
from policies.events import from_body
from policies.evidence import Counts
from policies.policy import Policy
from policies.rollout import Illegal, Rollout, step
from policies.traffic import Route
from policies.verdict import GateReport, Verdict
from tasks.ports import Bundle, Deployment, Entry, ModelVersion, PortError, Ports, Signature
from tests.fakes.ledger import FakeLedger
from tests.fakes.router import FakeRouter
from tests.fakes.target import FakeTarget
from tests.fakes.telemetry import Behaviour, FakeTelemetry
from tests.simulation.actors import Actor, Actors, SimClock
from tests.simulation.chaos import Wire
from tests.simulation.scenario import PORTS, Asked, Scenario
from tests.stories.world import MemoryRegistry, directly

MODEL = "m"
SETTLED_AFTER_S = 2400.0  # of calm: by then everything must have been brought to its end
_MOMENT_S = 0.02
_STEP_S = 20.0
_PASS = [GateReport("quality", Verdict.PASS, "fine")]


class SimLedger(FakeLedger):
    """Folds only what is new of a rollout: reconcilers ask again and again what is unsettled."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now)
        self._folded: dict[str, tuple[int, Rollout | None]] = {}

    def _state(self, name: str) -> Rollout | None:
        known, state = self._folded.get(name, (0, None))
        book = self._books[name]
        for entry in book[known:]:
            state, _ = step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
        self._folded[name] = (len(book), state)
        return state


class SimRegistry(MemoryRegistry):
    """Versions with the scenario's digests; their files can be fetched. `told`: the rollouts whose end it knows of."""

    def __init__(self, digests: dict[str, str]) -> None:
        super().__init__()
        self.digests = digests
        self.told: set[str] = set()

    def tag(self, model: str, version: str, tags: dict[str, str]) -> None:
        super().tag(model, version, tags)
        self.told.add(tags["lockgate.rollout"])

    def version(self, model: str, version: str) -> ModelVersion:
        return ModelVersion(model, version, self.digests[version], Signature((), ()), "run")

    def by_alias(self, model: str, alias: str) -> ModelVersion | None:
        named = self.aliases.get(alias)
        return self.version(model, named) if named else None

    def fetch(self, version: ModelVersion) -> Bundle:
        return Bundle(onnx=Path(version.digest))


class SimTelemetry(FakeTelemetry):
    """Counters without histograms, that are sometimes down and sometimes lie."""

    def __init__(self, clock: SimClock, router: FakeRouter, made: Scenario, chance: random.Random) -> None:
        super().__init__(clock, router, rps=300.0)
        self.made, self.chance = made, chance
        self.silent = made.silent
        self.resets: dict[tuple[str, bool], int] = {}

    def counts(self, model: str, version: str, shadow: bool) -> Counts:
        now = self.clock.monotonic
        if any(begin <= now < end for begin, end in self.made.outages):
            if self.made.outages_lie:
                return self.chance.choice((Counts(-7, 0), Counts(math.nan, 0), Counts(9, math.inf)))  # type: ignore[arg-type]
            raise PortError("the telemetry is down (by the simulation)")
        requests = int(self.requests.get((model, version, shadow), 0.0)) - self.resets.get((version, shadow), 0)
        errors = int(requests * self.behaviour.get(version, Behaviour()).errors)
        truth = Counts(requests, errors, epoch="fake")
        if self.chance.random() >= self.made.lies or now > 100.0:
            return truth
        return self._lie(truth, version, shadow)

    def _lie(self, truth: Counts, version: str, shadow: bool) -> Counts:
        kind = self.chance.choice(("nan", "negative", "reset", "infinite", "nothing"))
        if kind == "reset":
            self.resets[version, shadow] = self.resets.get((version, shadow), 0) + truth.requests
            return Counts(0, 0, epoch="fake")
        if kind == "nan":
            return replace(truth, requests=math.nan)  # type: ignore[arg-type]
        if kind == "infinite":
            return replace(truth, errors=math.inf)  # type: ignore[arg-type]
        return replace(truth, requests=-7) if kind == "negative" else Counts(0, 0, epoch="fake")


class SimRouter(FakeRouter):
    """Notes for every route that comes into force when that was, and what was in quarantine then."""

    def __init__(self, clock: SimClock, target: FakeTarget, ledger: FakeLedger) -> None:
        super().__init__(clock, target)
        self.ledger = ledger
        self.noted: list[tuple[float, Route, frozenset[str]]] = []

    def _hold(self, route: Route, ends: float | None) -> None:
        super()._hold(route, ends)
        self.noted.append((self.clock.monotonic, route, frozenset(self.ledger._standing())))

    def next_end(self) -> float | None:
        """When the next lease runs out."""
        return min((held.ends for held in self.held.values() if held.ends is not None), default=None)


@dataclass
class Delivered:
    """What became of one delivery, as its caller saw it."""

    asked: Asked
    rollout: str
    refused: str = ""


@dataclass
class Run:
    """One seed's world."""

    made: Scenario
    errors: list[str] = field(default_factory=list)
    delivered: list[Delivered] = field(default_factory=list)
    trace: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        made = self.made
        self.chance = random.Random(made.seed * 7919 + 1)
        self.clock = SimClock()
        self.actors = Actors(self.clock, self.chance)
        self.ledger = SimLedger(self.clock.now)
        self.target = FakeTarget()
        self.router = SimRouter(self.clock, self.target, self.ledger)
        self.clock.next_alarm = self.router.next_end
        self.telemetry = SimTelemetry(self.clock, self.router, made, self.chance)
        self.telemetry.behaviour = {v: Behaviour(errors=share) for v, share in made.errors.items()}
        self.registry = SimRegistry(made.digests)
        if not made.first:
            self.target.deploy(Deployment(MODEL, "1", "digest-1", Path("digest-1")))
            self.router.apply(Route(MODEL, stable="1"))
            self.registry.aliases["champion"] = "1"
        self.ports = self._ports()

    def _ports(self) -> Ports:
        behind = {name: getattr(self, name) for name in PORTS}
        wires: dict[str, Any] = {
            name: Wire(name, port, self.actors, self.made.weather, self.chance) for name, port in behind.items()
        }
        nothing: dict[str, Any] = dict.fromkeys(("inspector", "rows", "contract", "probe", "reporter"))
        return Ports(clock=self.clock, **wires, **nothing)

    # ------------------------------------------------------------ the run

    def play(self) -> Run:
        """Plays it to the end: until after the last trouble everything has come to rest."""
        made = self.made
        for number, asked in enumerate(made.asked):
            self.actors.spawn(f"{asked.what} {asked.version} ({number})", self._work(asked, number), asked.at)
        for number in range(made.reconcilers):
            self._schedule(number, made.every * (number + 1) / made.reconcilers)
        self.actors.spawn("fate", self._fate)
        troubled = [made.weather.until, *made.deaths, *(at for at, _ in made.jumps), *(end for _, end in made.outages)]
        troubled += [end for _, end in made.weather.down.values()]
        calm = max([100.0, *troubled, *(asked.at for asked in made.asked)])
        self.actors.run(calm)
        while self.clock.monotonic < calm + SETTLED_AFTER_S and not self.at_rest():
            self.actors.run(self.clock.monotonic + _STEP_S)
            self.clock.pass_to(self.clock.monotonic + 1e-3)
        # What is left over is mended by the next pass; the end is not in the middle of one.
        self.actors.run(self.clock.monotonic + 6.5 * made.every)
        limit = self.clock.monotonic + SETTLED_AFTER_S
        while self.actors.busy("reconcile") and self.clock.monotonic < limit:
            self.actors.run(self.clock.monotonic + _MOMENT_S)
            self.clock.pass_to(self.clock.monotonic + _MOMENT_S)
        self.rested = self.at_rest()
        self.actors.end()
        self.errors += [f"{a.name}: {a.error!r}" for a in self.actors.all if a.error is not None]
        return self

    def at_rest(self) -> bool:
        """Nobody who asked for something still waits, and the ledger has nothing left to be done."""
        waiting = any(
            not actor.ended for actor in self.actors.all if actor.name.startswith(("deliver", "rollback", "late"))
        )
        return not waiting and not self.ledger.unsettled()

    def states(self) -> list[Rollout]:
        """The rollouts as they stand, newest first."""
        return [state for name in self.ledger._requested() if (state := self.ledger._state(name)) is not None]

    def _work(self, asked: Asked, number: int) -> Callable[[], None]:
        def work() -> None:
            try:
                if asked.what == "deliver":
                    self._deliver(asked, number)
                elif asked.what == "rollback":
                    take_back(self.ports, MODEL, "the call centre", f"person-{number}", self._observe, directly)
                elif asked.what in ("approve", "refuse"):
                    self._answer(asked)
                else:
                    self._order(asked, number)
            except PortError as exc:
                self._say(f"{asked.what}: {exc!r}")  # the person is told, and may try again

        return work

    def _deliver(self, asked: Asked, number: int) -> None:
        request = Delivery(model=MODEL, source="x.onnx", policy="")
        version = self.registry.version(MODEL, asked.version)
        name = f"{MODEL}-v{asked.version}-{number}"
        mine = Delivered(asked, name)
        self.delivered.append(mine)
        try:
            refuse_pointless(self.ports, version)
            mine.refused = start(self.ports, self.made.policy, version, request, name) or ""
        except PortError as exc:
            mine.refused = str(exc)
            raise
        if not mine.refused:
            to_the_end(self.ports, name, "local", self._controller(name, f"flow-{number}").drive)

    def _order(self, asked: Asked, number: int) -> None:
        active = self.ledger.rollouts(MODEL, active=True)
        try:
            if active:
                order(self.ports, active[0], f"person-{number}", asked.what, "because")
        except Illegal as exc:
            self._say(f"{asked.what}: {exc}")

    def _answer(self, asked: Asked) -> None:
        try:
            question = approval.asked(self.ports.ledger, MODEL, self.clock.now())
            self.clock.sleep(self.chance.uniform(0.0, 5.0))  # it may be another question by now
            approval.answer(self.ports.ledger, self.clock, question, f"person-{asked.version}", asked.what, "seen")
        except Illegal as exc:
            self._say(f"{asked.what}: {exc}")

    def _controller(self, name: str, who: str) -> Controller:
        return Controller(self.ports, name, who, directly, self._checks(()), self._observe)

    def _checks(self, _entries: Sequence[Entry]) -> Checks:
        def checks(_state: Rollout, _policy: Policy) -> Sequence[GateReport]:
            self.clock.sleep(self.chance.uniform(0.5, 5.0))
            return _PASS

        return checks

    # ------------------------------------------------------------ reconcilers, deaths, jumps

    def _schedule(self, number: int, after: float) -> None:
        def work() -> None:
            self._schedule(number, self.made.every)
            at_once = self.chance.random() < 0.05
            try:
                done = reconcile_with(
                    self.ports,
                    f"reconciler-{number}",
                    directly,
                    self._checks,
                    at_once,
                    lambda jobs: self._side_by_side([*jobs.values()]),
                    self._side_by_side,
                    lambda _rollout: nullcontext(self._observe),
                )
                self._say(f"pass: {done}")
            except PortError as exc:
                self._say(f"the pass could not look: {exc!r}")  # the next one will

        self.actors.spawn(f"reconcile {number}", work, after)

    def _side_by_side(self, jobs: Sequence[Callable[[], None]]) -> None:
        def tried(job: Callable[[], None]) -> None:
            try:
                job()
            except PortError as exc:
                self._say(f"a part of the pass could not look: {exc!r}")  # the next one will

        for job in jobs:
            self.actors.spawn("reconcile job", partial(tried, job))

    def _fate(self) -> None:
        happens = sorted([*((at, 0.0) for at in self.made.deaths), *self.made.jumps])
        for at, by in happens:
            self.clock.sleep(at - self.clock.monotonic)
            if by:
                self.clock.jump(by)
            else:
                self._kill_one()

    def _kill_one(self) -> None:
        living: list[Actor] = [
            actor
            for actor in self.actors.all
            if actor.life is not None and not actor.ended and not actor.name.startswith(("fate", "late"))
        ]
        if living:
            victim = self.chance.choice(living)
            victim.die()
            self._say(f"{victim.name} dies")

    def _observe(self, progress: Progress) -> None:
        if self.trace:
            self._say(f"{progress.rollout} {progress.state.label}: {progress.event}")

    def _say(self, what: str) -> None:
        if self.trace:
            actor = self.actors.current.name if self.actors.current else "-"
            self.trace(f"{self.clock.monotonic:8.2f} {actor:<22} {what}")
