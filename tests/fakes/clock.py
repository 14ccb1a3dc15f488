"""A fake Clock: time passes only when somebody sleeps. `jump` moves it, as a corrected system clock does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class FakeClock:
    """Virtual time, in POSIX seconds. `alarms` are called whenever time has passed, with the time."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self.time = start
        self.monotonic = 0.0
        self.alarms: list[Callable[[], None]] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.time += seconds
            self.monotonic += seconds
        for alarm in self.alarms:
            alarm()

    def beside(self, work: Callable[[], T]) -> Future[T]:
        """Done at once."""
        made: Future[T] = Future()
        try:
            made.set_result(work())
        except Exception as exc:  # noqa: BLE001 - it is raised where the result is asked for
            made.set_exception(exc)
        return made

    def jump(self, seconds: float) -> None:
        """The wall clock is set; no time has passed."""
        self.time += seconds
