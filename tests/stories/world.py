"""Given / when / then for whole rollouts: the real controller and machine, fakes of all ports, virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from flows.rollout import Controller, Progress
from policies.events import Requested, to_body
from policies.policy import Policy
from policies.policy_yaml import parse
from policies.rollout import Rollout, terms
from policies.traffic import Route
from policies.verdict import GateReport, Verdict
from tasks.ports import Deployment, ModelVersion, Ports, Signature
from tests.fakes.clock import FakeClock
from tests.fakes.ledger import FakeLedger
from tests.fakes.router import FakeRouter
from tests.fakes.target import FakeTarget
from tests.fakes.telemetry import Behaviour, FakeTelemetry

MODEL = "m"
POLICY = """
policy: story
rollout:
  stages:
    - shadow: {share: 1.0, for: 8s}
    - canary: {weight: 20, for: 10s}
    - canary: {weight: 50, for: 10s}
  gates:
    errors: {margin: 0.02}
  watch: {for: 8s, shadow: 0.25}
  burn_in: 2s
  patience: 60s
  grace: 10s
  lease: 10s
"""


class Died(BaseException):
    """The controller's process."""


class MemoryRegistry:
    """The part of the registry that a rollout touches: versions, aliases and tags. `down` makes it raise PortError."""

    def __init__(self) -> None:
        from tasks.ports import PortError

        self.error = PortError("the registry is down (by the test)")
        self.down = False
        self.aliases: dict[str, str | None] = {}
        self.tags: dict[str, dict[str, str]] = {}

    def _up(self) -> None:
        if self.down:
            raise self.error

    def version(self, model: str, version: str) -> ModelVersion:
        self._up()
        return ModelVersion(model, version, f"digest-{version}", Signature((), ()), "run")

    def by_alias(self, model: str, alias: str) -> ModelVersion | None:
        version = self.aliases.get(alias)
        return None if version is None else self.version(model, version)

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        self._up()
        self.aliases[alias] = version

    def drop_alias(self, model: str, alias: str, version: str) -> None:
        self._up()
        if self.aliases.get(alias) == version:
            del self.aliases[alias]

    def tag(self, model: str, version: str, tags: dict[str, str]) -> None:
        self._up()
        self.tags.setdefault(version, {}).update(tags)


def directly(task: Any, *args: Any, name: str = "") -> Any:
    """Runs a Prefect task's function without the engine."""
    return task.fn(*args)


def of_tomorrow(world: World, name: str, model: str) -> None:
    """A rollout that this version of lockgate cannot read: it has an entry of a kind that is not known here."""
    world.request(name)
    first = world.ledger._books[name][0]
    world.ledger._books[name][0] = replace(first, body={**first.body, "model": model})
    world.ledger.append(name, 2, world.clock.now(), "of tomorrow", "certified", {})


class World:
    """One model in service as v1 (unless `first`), and a candidate v2 to come."""

    def __init__(self, policy: str = POLICY, first: bool = False, rps: float = 200.0) -> None:
        self.policy: Policy = parse(policy)
        self.clock = FakeClock()
        self.ledger = FakeLedger(self.clock.now)
        self.target = FakeTarget()
        self.router = FakeRouter(self.clock, self.target)
        self.telemetry = FakeTelemetry(self.clock, self.router, rps)
        self.registry = MemoryRegistry()
        self.checks: list[GateReport] = [GateReport("quality", Verdict.PASS, "fine")]
        self.stable = None if first else "1"
        if self.stable:
            self.target.deploy(Deployment(MODEL, "1", "digest-1", self.target.stored("digest-1") or "x"))  # type: ignore[arg-type]
            self.router.apply(Route(MODEL, stable="1"))
            self.registry.aliases["champion"] = "1"
        self.target.store.add("digest-2")
        self.ports = Ports(
            registry=self.registry,  # type: ignore[arg-type]
            inspector=None,  # type: ignore[arg-type]
            rows=None,  # type: ignore[arg-type]
            contract=None,  # type: ignore[arg-type]
            probe=None,  # type: ignore[arg-type]
            target=self.target,
            router=self.router,
            telemetry=self.telemetry,
            ledger=self.ledger,
            reporter=None,  # type: ignore[arg-type]
            clock=self.clock,
        )
        self.seen: list[Progress] = []

    def given(self, version: str, **behaviour: float) -> World:
        self.telemetry.behaviour[version] = Behaviour(**behaviour)
        return self

    def request(self, name: str = "r1", candidate: str = "2", flow_run: str | None = None, by: str = "") -> str:
        """Writes the request of a rollout into the ledger."""
        rules = terms(self.policy)
        event = Requested(self.clock.now(), 0, MODEL, candidate, f"digest-{candidate}", self.stable, rules, by=by)
        kind, body = to_body(event)
        body["policy"] = self.policy.model_dump(mode="json", by_alias=True)
        body["policy_digest"], body["flow_run"] = self.policy.digest, flow_run
        self.ledger.append(name, 1, event.at, "test", kind, body)
        return name

    def controller(self, name: str = "r1", who: str = "controller-1") -> Controller:
        def checks(_state: Rollout, _policy: Policy) -> Sequence[GateReport]:
            return self.checks

        return Controller(self.ports, name, who, directly, checks, self.seen.append)

    def drive(self, name: str = "r1") -> Rollout:
        """When the rollout is requested and driven to its end."""
        return self.controller(self.request(name)).drive()

    def drive_until_death(self, moment: float, name: str = "r1") -> None:
        """Its controller dies at that moment of the monotonic clock, or right after."""
        controller = self.controller(name)

        def die() -> None:
            if self.clock.monotonic >= moment:
                self.clock.alarms.remove(die)
                raise Died

        self.clock.alarms.append(die)
        with pytest.raises(Died):
            controller.drive()

    @property
    def weights(self) -> list[tuple[str | None, str | None, int, int]]:
        """Every route that was in force: (stable, candidate, weight, shadow)."""
        return [(route.stable, route.candidate, route.weight, route.shadow) for route in self.router.history]
