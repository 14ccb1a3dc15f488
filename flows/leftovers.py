"""What the dead have left behind, where no rollout is under way: claims, processes, the champion's alias."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from flows.orders import over
from flows.runner import Runner
from flows.story import fold, state_of
from flows.turn import BEGIN_S
from policies.events import Phase
from tasks.deployment import undeploy
from tasks.outcome import set_champion
from tasks.ports import NotThere, Ports


def mend(ports: Ports, model: str, who: str, run: Runner, mended: Callable[[str], None]) -> None:
    """Alias and processes of a model that has no rollout under way. It is claimed meanwhile, so that none begins."""
    _free(ports, model)
    if not _amiss(ports, model):
        return
    claim = f"mending/{model}/{who}/{uuid.uuid4().hex[:6]}"
    if ports.ledger.claim(model, "local", claim) != claim:
        return
    try:
        for what, work in _amiss(ports, model).items():
            run(*work, name=what)
            mended(f"{model}: {what}")
    finally:
        ports.ledger.release(model, "local", claim)


def _free(ports: Ports, model: str) -> None:
    """Releases a claim whose rollout is over, or never began: its controller died before it could."""
    newest = next(iter(ports.ledger.rollouts(model)), None)
    if newest in ports.ledger.unsettled():
        return
    mine = newest or f"mending/{model}"  # what is over does no harm if it gets the claim
    holder = ports.ledger.claim(model, "local", mine)
    state = fold(ports.ledger.read(holder))
    if holder != mine and state is None:
        ports.clock.sleep(BEGIN_S)
        state = fold(ports.ledger.read(holder))
    if state is None or over(state):
        ports.ledger.release(model, "local", holder, unbegun=state is None)


def _amiss(ports: Ports, model: str) -> dict[str, tuple[Any, ...]]:
    """What is to be mended, with the task and its arguments."""
    route = ports.router.current(model)
    if route is None or route.candidate is not None:
        return {}
    if not set(ports.ledger.rollouts(model)).isdisjoint(ports.ledger.unsettled()):
        return {}
    found: dict[str, tuple[Any, ...]] = {}
    for version in ports.target.running(model):
        if version != route.stable:
            found[f"undeploy v{version}"] = (undeploy, ports.target, model, version)
    for version in ports.target.running(f"{model}.trial"):
        found[f"end trial of v{version}"] = (undeploy, ports.target, model, version, True)
    proven, previous = _last_proven(ports, model)
    if proven is not None and proven == route.stable and _champion(ports, model) != proven:
        found[f"champion is v{proven}"] = (set_champion, ports.registry, model, proven, previous)
    return found


def _last_proven(ports: Ports, model: str) -> tuple[str | None, str | None]:
    """The version that the ledger says should serve, and the one before it.

    It is that of the newest promoted rollout (each waits for the one before); where none was ever promoted, the one
    that served when the first began.
    """
    first = None
    for name in ports.ledger.rollouts(model):
        state = state_of(ports.ledger, name)
        if state.phase is Phase.PROMOTED:
            return state.candidate, state.stable
        first = state.stable
    return first, None


def _champion(ports: Ports, model: str) -> str | None:
    try:
        named = ports.registry.by_alias(model, "champion")
    except NotThere:
        return None
    return named.version if named else None
