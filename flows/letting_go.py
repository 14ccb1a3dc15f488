"""What becomes of a rollout whose flow run is cancelled or crashes: Prefect calls these hooks beside the run's process.

They are the quick way. Where nobody calls them (the worker is gone, the machine too) the reconciler comes to the same
end. It does no harm if both act: what they say stands in the ledger once, and each change of traffic has its epoch.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger

from flows.orders import abort, over
from flows.publish import showing
from flows.rollout import Controller, Superseded, Watched, unwatched
from flows.runner import directly, whoami
from flows.story import fold, run_of, target_of
from flows.wiring import connect, links
from policies.events import Phase
from tasks.ports import Ports


def on_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - Prefect's names
    """Whoever cancels a delivery's run wants its rollout back: now, not at the reconciler's next pass."""
    ports = connect()
    said = let_go(ports, str(flow_run.id), "its flow run was cancelled", partial(showing, ports.ledger, links))
    flow_run_logger(flow_run).info("cancelled: %s", said)


def on_crashed(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - Prefect's names
    """A run that crashed on its way back goes back at once. Any other rollout goes on: the reconciler takes it over.

    A run crashes when Prefect's server is away for some minutes, too. That says nothing against the candidate.
    """
    ports = connect()
    said = let_go(ports, str(flow_run.id), watched=partial(showing, ports.ledger, links))
    flow_run_logger(flow_run).warning("crashed: %s", said)


def let_go(ports: Ports, run: str, abort_because: str = "", watched: Watched = unwatched) -> str:
    """The run's rollout is back if it is to go back; says how it stands. Raises PortError."""
    name = next((each for each in ports.ledger.unsettled() if run_of(ports.ledger.read(each)) == run), None)
    if name is None:
        return "no rollout of this run is under way"
    who = f"{whoami()}/{uuid.uuid4().hex[:6]}"
    if abort_because:
        abort(ports, name, who, abort_because)
    entries = ports.ledger.read(name)
    rollout = fold(entries)
    assert rollout is not None  # what is unsettled was requested
    if not (rollout.ended or rollout.phase is Phase.ROLLING_BACK):
        return f"rollout {name} is left to the reconciler: {rollout.label}"
    try:
        with watched(name) as observe:
            rollout = Controller(ports, name, who, directly, lambda _state, _policy: (), observe).drive()
    except Superseded as exc:
        return str(exc)
    if over(rollout):
        ports.ledger.release(rollout.model, target_of(entries), name)
    return f"rollout {name}: {rollout.label}"
