"""Several processes on one virtual clock, in one real process: at any moment one runs, and chance says which is next.

An actor is a thread that runs only while it has the baton, and gives it back when it sleeps; so the same seed gives
the same order of everything. An actor that is doomed dies at the next thing that it tries (`Killed`, a BaseException,
so that no `except Exception` survives it), and so does what its `finally` blocks try: a dead process does nothing.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from typing import Any

from tests.fakes.clock import FakeClock

DEADLINE_S = 60.0  # real seconds that an actor may run without giving the baton back: else it hangs for good


class Killed(BaseException):
    """The process is dead."""


class SimClock(FakeClock):
    """Virtual time that can be waited for by several actors. Leases end exactly when they do, whoever sleeps longer."""

    def __init__(self) -> None:
        super().__init__()
        self.wait: Callable[[float], None] = super().sleep
        self.next_alarm: Callable[[], float | None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.wait(max(seconds, 0.0))

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
        self.doomed = False
        self.ended = False
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self.go = threading.Semaphore(0)


class Actors:
    """Whoever waits, and until when."""

    def __init__(self, clock: SimClock, chance: random.Random) -> None:
        self.clock, self.chance = clock, chance
        self.current: Actor | None = None
        self.all: list[Actor] = []
        self._queue: list[tuple[float, float, int, Actor]] = []
        self._count = 0
        self._back = threading.Semaphore(0)
        clock.wait = self._sleep

    def spawn(self, name: str, work: Callable[[], Any], after: float = 0.0) -> Actor:
        """A process that starts that much later."""
        actor = Actor(name, work)
        self.all.append(actor)
        self._push(self.clock.monotonic + after, actor)
        return actor

    def check_alive(self) -> None:
        """Raises Killed in an actor that is doomed."""
        if self.current is not None and self.current.doomed:
            raise Killed

    def run(self, until: float) -> None:
        """Runs everybody until nobody waits, or the moment (monotonic) is reached."""
        while self._queue and self._queue[0][0] <= until:
            when, _, _, actor = heapq.heappop(self._queue)
            self.clock.pass_to(when)
            self._give_baton(actor)

    def end(self) -> None:
        """Nobody outlives the run."""
        while self._queue:
            *_, actor = heapq.heappop(self._queue)
            actor.doomed = True
            if actor.thread is not None:
                self._give_baton(actor)

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
            self.clock.pass_to(when)  # nobody else wants to run before: no need to change threads
        else:
            self._push(when, actor)
            self._back.release()
            actor.go.acquire()
        self.check_alive()

    def _give_baton(self, actor: Actor) -> None:
        self.current = actor
        if actor.thread is None:
            actor.thread = threading.Thread(target=self._live, args=(actor,), name=actor.name, daemon=True)
            actor.thread.start()
        else:
            actor.go.release()
        if not self._back.acquire(timeout=DEADLINE_S):
            raise TimeoutError(f"{actor.name} has run for {DEADLINE_S:.0f} s without waiting for anything")
        self.current = None

    def _live(self, actor: Actor) -> None:
        try:
            if not actor.doomed:
                actor.work()
        except Killed:
            pass
        except Exception as exc:  # noqa: BLE001 - kept, and looked at when the run is over
            actor.error = exc
        finally:
            actor.ended = True
            self._back.release()
