"""The moves of a rollout that others may hang something on, by name: what an event made of it, told from outside."""

from __future__ import annotations

from policies.events import LOOKED_AT, Answered, Event, Phase, Taken
from policies.rollout import Rollout

_ENDS = {
    Phase.ROLLING_BACK: "rolling_back",
    Phase.ROLLED_BACK: "rolled_back",
    Phase.REFUSED: "refused",
    Phase.HALTED: "halted",
    Phase.PROMOTING: "promoting",
    Phase.PROMOTED: "promoted",
}
NAMES = (
    "started", "stage_entered", "promoting", "promoted", "rolling_back", "rolled_back", "refused", "halted",
    "paused", "resumed", "approval_asked", "approval_given", "approval_refused", "taken_over",
)  # fmt: skip


def transitions(before: Rollout | None, event: Event, after: Rollout) -> tuple[str, ...]:
    """The names of what happened, in order; most events (a look that holds) are no transition.

    A stage is entered when its traffic is asked for, a few milliseconds before it is in force.
    """
    if before is None:
        return ("started",)
    found: list[str] = []
    if isinstance(event, Taken) and before.holder:
        found.append("taken_over")
    if isinstance(event, Answered):
        found.append("approval_given" if event.answer == "approve" else "approval_refused")
    if after.question is not None and (before.question is None or before.question.number != after.question.number):
        found.append("approval_asked")
    if after.paused_at is not None and before.paused_at is None:
        found.append("paused")
    if before.paused_at is not None and after.paused_at is None and after.phase is before.phase:
        found.append("resumed")
    if (after.phase, after.stage) != (before.phase, before.stage):
        found.append("stage_entered" if after.phase in LOOKED_AT else _ENDS[after.phase])
    return tuple(found)
