"""Times in which nothing new is let on. What goes back never asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

WEEK_S = 604_800.0
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MONDAY_S = 4 * 86_400.0  # 1970-01-05, the first Monday
_JOINED_MAX = 1000  # windows that touch each other


@dataclass(frozen=True)
class Window:
    """From `start` until before `end` (POSIX seconds), once or, with `every_s`, again and again."""

    start: float
    end: float
    every_s: float | None = None
    why: str = ""

    def end_at(self, at: float) -> float | None:
        """When the window that holds this time ends; None if none of its times does."""
        shift = 0.0 if self.every_s is None else (at - self.start) // self.every_s * self.every_s
        return self.end + shift if self.start + shift <= at < self.end + shift else None


def until(windows: Iterable[Window], at: float) -> float | None:
    """When something new may be let on again, where it may not be now; windows that touch are one."""
    windows, end = tuple(windows), None
    for _ in range(_JOINED_MAX):
        later = [found for each in windows if (found := each.end_at(at if end is None else end)) is not None]
        if not later:
            return end
        end = max(later)
    return end


def endless(windows: Iterable[Window]) -> bool:
    """Whether those that come every week leave no time between them."""
    weekly = [each for each in windows if each.every_s is not None]
    ends = (until(weekly, each.start) for each in weekly)
    return any(end is not None and end - each.start >= WEEK_S for each, end in zip(weekly, ends, strict=True))


def why(windows: Iterable[Window], at: float) -> str:
    """The reason that the policy gives for the freeze at this time."""
    return "; ".join(each.why for each in windows if each.why and each.end_at(at) is not None)


def window(begins: str, ends: str, reason: str = "") -> Window:
    """The window of two times with a zone (2026-12-23T18:00Z), or of two times of the week in UTC (fri 16:00).

    Raises ValueError with what to write instead.
    """
    first, last = _of_week(begins), _of_week(ends)
    if first is not None and last is not None:
        length = (last - first) % WEEK_S
        if length == 0.0:
            raise ValueError(f"from {begins} to {ends} is the whole week: nothing would ever be let on")
        return Window(first, first + length, WEEK_S, reason)
    start, end = _moment(begins), _moment(ends)
    if end <= start:
        raise ValueError(f"the freeze ends ({ends}) before it begins ({begins})")
    return Window(start, end, None, reason)


def _of_week(text: str) -> float | None:
    day, _, clock = text.strip().lower().partition(" ")
    if day not in _DAYS:
        return None
    try:
        hours, minutes = (int(part) for part in clock.split(":"))
    except ValueError:
        hours = minutes = -1
    if not ((0 <= hours < 24 and 0 <= minutes < 60) or (hours, minutes) == (24, 0)):
        raise ValueError(f"'{text}' is no time of the week; write it like: fri 16:00")
    return _MONDAY_S + _DAYS.index(day) * 86_400.0 + hours * 3600.0 + minutes * 60.0


def _moment(text: str) -> float:
    try:
        made = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ValueError(f"'{text}' is no time; write 2026-12-23T18:00Z, or fri 16:00 for every week") from exc
    if made.tzinfo is None:
        raise ValueError(f"'{text}' has no time zone; write it like 2026-12-23T18:00Z or 2026-12-23T18:00+04:00")
    return made.timestamp()
