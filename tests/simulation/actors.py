"""Several processes on one virtual clock, in one real process: at any moment one runs, and chance says which is next.

An actor is a greenlet: it runs until it sleeps; so the same seed gives the same order of everything. An actor that is
doomed dies at the next thing that it tries (`Killed`, a BaseException, so that no `except Exception` survives it), and
so does what its `finally` blocks try: a dead process does nothing.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from tests.fakes.clock import FakeClock

T = TypeVar("T")
_CALLS_MAX = 10_000  # that may be made while no time passes: whoever makes more will never wait


class Killed(BaseException):
    """The process is dead."""


class SimClock(FakeClock):
    """Virtual time that can be waited for by several actors. Leases end exactly when they do, whoever sleeps longer."""

    def __init__(self) -> None:
        super().__init__()
        self.wait: Callable[[float], None] = super().sleep
        self.begin: Callable[[Callable[[], Any]], Future[Any]] = super().beside
        self.next_alarm: Callable[[], float | None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.wait(max(seconds, 0.0))

    def beside(self, work: Callable[[], T]) -> Future[T]:
        """Another thread of the actor, which dies with it."""
        return self.begin(work)

    def pass_to(self, moment: float) -> None:
        """Time goes on to the moment (monotonic), by way of every alarm that falls due before."""
        while self.monotonic < moment:
            alarm = self.next_alarm()
            until = moment if alarm is None else min(moment, max(alarm, self.monotonic + 1e-6))
            passed = until - self.monotonic
            self.monotonic = until
            self.time += passed
            for each in self.alarms:
                each()


class Actor:
    """One process. `ended` by itself, by `error`, or because it was `doomed`."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        self.name, self.work = name, work
        self.parent: Actor | None = None  # whose thread it is
        self.doomed = False
        self.ended = False
        self.error: Exception | None = None
        self.life: greenlet | None = None

    @property
    def dead(self) -> bool:
        return self.doomed or (self.parent is not None and self.parent.dead)

    def die(self) -> None:
        """The whole process does, from its next call on."""
        self.doomed = True
        if self.parent is not None:
            self.parent.die()


class Actors:
    """Whoever waits, and until when."""

    def __init__(self, clock: SimClock, chance: random.Random) -> None:
        self.clock, self.chance = clock, chance
        self.current: Actor | None = None
        self.all: list[Actor] = []
        self._queue: list[tuple[float, float, int, Actor]] = []
        self._count = 0
        self._calls, self._calls_at = 0, 0.0
        self._hub = getcurrent()
        clock.wait = self._sleep
        clock.begin = self._begin

    def spawn(self, name: str, work: Callable[[], Any], after: float = 0.0) -> Actor:
        """A process that starts that much later."""
        actor = Actor(name, work)
        self.all.append(actor)
        self._push(self.clock.monotonic + after, actor)
        return actor

    def _begin(self, work: Callable[[], T]) -> Future[T]:
        made: Future[T] = Future()

        def fulfil() -> None:
            try:
                made.set_result(work())
            except Exception as exc:  # noqa: BLE001 - it is raised where the result is asked for
                made.set_exception(exc)

        parent = self.current
        assert parent is not None
        self.spawn(parent.name, fulfil).parent = parent
        return made

    def check_alive(self) -> None:
        """Asked before each call. Raises Killed in an actor that is doomed, RuntimeError in one that never waits."""
        if self.current is not None and self.current.dead:
            raise Killed
        self._calls = self._calls + 1 if self._calls_at == self.clock.monotonic else 0
        self._calls_at = self.clock.monotonic
        if self._calls > _CALLS_MAX:
            raise RuntimeError(f"{_CALLS_MAX:,} calls at one moment")

    def run(self, until: float) -> None:
        """Runs everybody until nobody waits, or the moment (monotonic) is reached."""
        while self._queue and self._queue[0][0] <= until:
            when, _, _, actor = heapq.heappop(self._queue)
            self.clock.pass_to(when)
            self._let_run(actor)

    def busy(self, name: str) -> bool:
        """Whether one whose name begins so has begun and not ended."""
        return any(each.life is not None and not each.ended and each.name.startswith(name) for each in self.all)

    def end(self) -> None:
        """Nobody outlives the run."""
        while self._queue:
            *_, actor = heapq.heappop(self._queue)
            actor.doomed = True
            if actor.life is not None:
                self._let_run(actor)

    def _push(self, when: float, actor: Actor) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self.chance.random(), self._count, actor))

    def _sleep(self, seconds: float) -> None:
        actor = self.current
        when = self.clock.monotonic + seconds
        if actor is None:
            self.clock.pass_to(when)
            return
        self.check_alive()
        if not self._queue or self._queue[0][0] > when:
            self.clock.pass_to(when)  # nobody else wants to run before
        else:
            self._push(when, actor)
            self._hub.switch()
        self.check_alive()

    def _let_run(self, actor: Actor) -> None:
        self.current = actor
        if actor.life is None:
            actor.life = greenlet(self._live)
            actor.life.switch(actor)
        else:
            actor.life.switch()
        self.current = None

    def _live(self, actor: Actor) -> None:
        try:
            if not actor.dead:
                actor.work()
        except Killed:
            pass
        except Exception as exc:  # noqa: BLE001 - kept, and looked at when the run is over
            actor.error = exc
        finally:
            actor.ended = True
