"""The fakes of all slow ports in a process of their own, shared by many, on a clock that runs faster than the wall's.

What a rollout's processes share in truth (who serves, what is routed, what was counted) they share here, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from typing import Any

from tasks.ports import Ledger, ModelVersion, Ports
from tests.fakes.clock import FakeClock
from tests.stories.world import World

_PORTS = ("registry", "target", "router", "telemetry")
_world: list[Shared] = []


@dataclass(frozen=True)
class FastClock:
    """`speed` virtual seconds pass in each second since `began` (POSIX)."""

    began: float
    speed: float

    def now(self) -> float:
        return self.began + (time.time() - self.began) * self.speed

    def sleep(self, seconds: float) -> None:
        time.sleep(max(seconds, 0.0) / self.speed)

    beside = FakeClock.beside


class Shared:
    """A story's world, one call at a time, at the time that the callers' clocks show."""

    def __init__(self, clock: FastClock, rps: float) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._world = World(rps=rps)
        self._world.target.store.update(f"digest-{number}" for number in range(2, 200))
        self._world.registry.by_alias = self._by_alias  # type: ignore[attr-defined]
        self._virtual: FakeClock = self._world.clock
        self._virtual.time = clock.now()

    def call(self, port: str, method: str, arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            self._virtual.sleep(self._clock.now() - self._virtual.time)
            return getattr(getattr(self._world, port), method)(*arguments)

    def _by_alias(self, model: str, alias: str) -> ModelVersion | None:
        number = self._world.registry.aliases.get(alias)
        return self._world.registry.version(model, number) if number else None


class Server(BaseManager):
    """The process that has it."""


def _begin(clock: FastClock, rps: float) -> None:
    _world.append(Shared(clock, rps))


def _the_world() -> Shared:
    return _world[0]


Server.register("world", _the_world, exposed=("call",))


def serve(clock: FastClock, rps: float) -> Server:
    """Started; to be shut down."""
    server = Server()
    server.start(_begin, (clock, rps))
    return server


class Remote:
    """A port in the shared world."""

    def __init__(self, port: str, world: Any) -> None:
        self._port, self._world = port, world

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._world.call(self._port, method, arguments)


def ports(address: Any, key: bytes, clock: FastClock, ledger: Ledger) -> Ports:
    """The ports of one process: its own ledger's connection, and the shared world."""
    client = Server(address, key)
    client.connect()
    world = client.world()  # type: ignore[attr-defined]
    wired: dict[str, Any] = {name: Remote(name, world) for name in _PORTS}
    nothing: dict[str, Any] = dict.fromkeys(("inspector", "rows", "contract", "probe", "reporter"))
    return Ports(ledger=ledger, clock=clock, **wired, **nothing)
