"""What in the registry asks for a delivery, and whether another flow run shall be started for it.

Level-triggered: the answer depends on how the registry stands, never on what was told of it. A wish ends by what the
delivery leaves behind: the alias is taken off the version, and the tag `lockgate.outcome` is on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policies.policy import Trigger

OUTCOME_TAG = "lockgate.outcome"
POLICY_TAG = "lockgate.policy"  # on a model: the name of its policy
_SOURCE_TAG = "lockgate.source"
_FIRST_S = 5.0
_LONGEST_S = 600.0
_MEMORY_S = 3600.0


def wanted(trigger: Trigger, aliases: Mapping[str, str], versions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The versions that are asked for, oldest first; `versions` has the tags of each.

    - `alias`: the version that the alias names.
    - `tag`: those with the tag, unless it says false, and without an outcome.
    - `version`: those without an outcome that are newer than the first that has one; where none has, the newest. A
      version that lockgate itself registered is being delivered already.
    """
    if trigger.kind == "alias":
        named = aliases.get(trigger.name)
        return [named] if named is not None and named in versions else []
    numbers = sorted(versions, key=int)
    open_ones = [number for number in numbers if OUTCOME_TAG not in versions[number]]
    if trigger.kind == "tag":
        return [number for number in open_ones if versions[number].get(trigger.name, "false").lower() != "false"]
    if trigger.kind == "version":
        dealt_with = [int(number) for number in numbers if OUTCOME_TAG in versions[number]]
        since = min(dealt_with) if dealt_with else int(numbers[-1]) - 1 if numbers else 0
        later = [number for number in open_ones if int(number) > since]
        return [number for number in later if versions[number].get(_SOURCE_TAG, "models:/").startswith("models:/")]
    return []


@dataclass(frozen=True)
class Run:
    """A flow run that was started for a wish: when it ended, in POSIX seconds (None: it is under way)."""

    ended_at: float | None
    cancelled: bool = False


def attempt(runs: Sequence[Run], now: float) -> int | None:
    """The number of the flow run to start now, from 1; None while one is under way, or the next has to wait.

    A wish that is still there after a run (the registry was away, a process was killed, or it was set anew) is tried
    again 5, 10, 20 ... seconds later, at most ten minutes; runs that ended more than an hour ago are forgiven.
    """
    ends = [run.ended_at for run in runs if run.ended_at is not None]
    if len(ends) < len(runs):
        return None
    recent = [end for end in ends if end > now - _MEMORY_S]
    if recent and now < max(recent) + min(_FIRST_S * 2.0 ** (len(recent) - 1), _LONGEST_S):
        return None
    return len(runs) + 1
