"""What people, and rollouts beside it, have to say to a rollout; its controller finds it in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from flows.story import fold
from policies import audit, rollout
from policies.events import Do, Event, Ordered, to_body
from policies.rollout import Rollout
from tasks.ports import Ledger, PortError, Ports, Refused


def order(ports: Ports, name: str, who: str, what: str, reason: str, by: str = "") -> Rollout:
    """A person's order, written to the rollout's ledger, where its controller finds it within one look.

    Raises `rollout.Illegal` where the order makes no sense, and ValueError for an unknown rollout.
    """
    if what == "abort":  # no way back is refused for a character
        reason = audit.clean(reason)
    return write(ports.ledger, name, who, lambda: Ordered(ports.clock.now(), 0, what, reason, by))


def write(
    ledger: Ledger, name: str, who: str, event_now: Callable[[], Event], extra: Mapping[str, Any] | None = None
) -> Rollout:
    """Writes what somebody beside the controller has to say; the rollout's state after it.

    Raises `rollout.Illegal` where it makes no sense, and ValueError for an unknown rollout.
    """
    for _ in range(20):
        entries = ledger.read(name)
        state = fold(entries)
        if state is None:
            raise ValueError(f"the ledger has no rollout '{name}'")
        event = event_now()
        after, _ = rollout.step(state, event)
        kind, body = to_body(event)
        try:
            ledger.append(name, entries[-1].sequence + 1, event.at, who, kind, {**body, **(extra or {})})
        except Refused:
            continue  # the controller wrote at the same moment: read again
        return after
    raise PortError(f"could not write to rollout {name}: too many writers")


def over(state: Rollout) -> bool:
    """The next rollout of the model may begin: this one has ended, its traffic is set, guilty bytes are locked away."""
    return state.ended and not state.pending and not any(effect.do is Do.QUARANTINE for effect in state.outbox)


def abort(ports: Ports, name: str, who: str, reason: str) -> None:
    """Orders the rollout to go back, unless it is doing so or has ended."""
    with suppress(rollout.Illegal):
        order(ports, name, who, "abort", reason)
