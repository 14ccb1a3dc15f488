"""What can go wrong with one call: a `Wire` stands before a port, and chance (with the run's seed) says what happens.

lost         the call never arrives; the caller gets PortError, at once or after a time-out
unanswered   the call arrives, its answer does not
late         the caller gives up; the call arrives afterwards all the same, when the world has moved on
twice        the call arrives twice
slow         the answer takes long
frozen       the caller's process is stopped (SIGSTOP) before the call, for longer than a lease
dies         the caller's process dies before the call, or after it was carried out and before it knows
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tasks.ports import PortError
from tests.simulation.actors import Actors, Killed

KINDS = ("lost", "unanswered", "late", "twice", "slow", "frozen", "dies before", "dies after")
# What may be given up on and arrive later: a request on a network. Reads have no effect; a commit happens or not.
CAN_BE_LATE = frozenset({"apply", "renew", "deploy", "undeploy", "set_alias", "tag"})
TIMEOUT_S = {"router": 5.0, "target": 10.0, "registry": 5.0, "telemetry": 2.0, "ledger": 5.0}


@dataclass
class Weather:
    """How likely each kind of fault is on any call, and until when (monotonic seconds); then it is calm for good."""

    rates: dict[str, float] = field(default_factory=dict)
    ports: frozenset[str] = frozenset()
    until: float = 0.0
    down: dict[str, tuple[float, float]] = field(default_factory=dict)  # ports that do not answer at all, from and to

    def strikes(self, port: str, now: float, chance: random.Random) -> str | None:
        """The fault that hits this call, if any."""
        begin, end = self.down.get(port, (0.0, 0.0))
        if begin <= now < end:
            return "lost"
        if now >= self.until or port not in self.ports:
            return None
        point = chance.random()
        for kind, rate in self.rates.items():
            point -= rate
            if point < 0:
                return kind
        return None


class Wire:
    """A port as its caller sees it: every method of `behind`, by way of the weather."""

    def __init__(self, port: str, behind: Any, actors: Actors, weather: Weather, chance: random.Random) -> None:
        self._port, self._behind = port, behind
        self._actors, self._weather, self._chance = actors, weather, chance

    def __getattr__(self, name: str) -> Any:
        act = getattr(self._behind, name)
        if not callable(act):
            return act

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, lambda: act(*args, **kwargs))

        return call

    def _call(self, name: str, act: Callable[[], Any]) -> Any:
        actors, clock = self._actors, self._actors.clock
        actors.check_alive()
        fault = self._weather.strikes(self._port, clock.monotonic, self._chance)
        if fault is None:
            if self._chance.random() < 0.2:
                clock.sleep(self._chance.uniform(0.0, 0.05))
            return act()
        if fault == "dies before":
            self._die()
        if fault in ("slow", "frozen"):
            clock.sleep(self._chance.uniform(0.1, 2.0) if fault == "slow" else self._chance.uniform(5.0, 60.0))
            return act()
        if fault == "lost" or (fault == "late" and name not in CAN_BE_LATE):
            self._time_out(name)
        if fault == "late":
            actors.spawn(f"late {name}", lambda: _quietly(act), self._chance.expovariate(1 / 20.0))
            self._time_out(name)
        answer = act()
        if fault == "twice":
            _quietly(act)
        if fault == "dies after":
            self._die()
        if fault == "unanswered":
            self._time_out(name)
        return answer

    def _die(self) -> None:
        assert self._actors.current is not None
        self._actors.current.die()
        raise Killed

    def _time_out(self, name: str) -> None:
        if self._chance.random() < 0.5:
            self._actors.clock.sleep(TIMEOUT_S[self._port])
        raise PortError(f"{self._port}.{name}: no answer (by the simulation)")


def _quietly(act: Callable[[], Any]) -> None:
    """Nobody hears the answer."""
    with suppress(PortError):
        act()
