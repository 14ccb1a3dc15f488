"""Flow runs on the Prefect server, as the triggers and the reconciler see them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

from flows.deployments import POOL
from flows.settings import Settings
from flows.triggers import REGISTRY, Seen, Wish, look
from flows.wiring import connect, prefect_client
from policies.triggers import Run
from tasks.ports import PortError

_PAGE = 200  # of runs; the server gives no more at once


class PrefectRuns:
    """`flows.triggers.Runs` on the Prefect server that the environment names."""

    def of(self, wishes: Sequence[Wish]) -> Mapping[str, Sequence[Run]]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
        from prefect.client.schemas.sorting import FlowRunSort

        mine = FlowRunFilter(tags=FlowRunFilterTags(any_=[_tag(wish) for wish in wishes]))
        found: list[Any] = []
        with prefect_client() as server:
            while page := server.read_flow_runs(
                flow_run_filter=mine, sort=FlowRunSort.ID_DESC, limit=_PAGE, offset=len(found)
            ):
                found += page
        found.sort(key=lambda each: each.created)
        return {wish.key: [_run(each) for each in found if _tag(wish) in each.tags] for wish in wishes}

    def start(self, wish: Wish, number: int) -> None:
        from prefect.exceptions import ObjectNotFound

        with prefect_client() as server:
            try:
                deployment = server.read_deployment_by_name("deliver/deliver")
            except ObjectNotFound as exc:
                missing = "the Prefect server has no deployment deliver/deliver yet; the worker brings it"
                raise PortError(missing) from exc
            server.create_flow_run_from_deployment(
                deployment.id,
                parameters={
                    "model": wish.model,
                    "version": int(wish.version),
                    "policy": wish.policy,
                    "reason": f"{wish.why} in the registry",
                    "by": REGISTRY,
                },
                name=f"{wish.model} v{wish.version} → local: asked for by the registry",
                tags=[POOL, _tag(wish)],
                idempotency_key=f"{wish.key}#{number}",
            )


def look_at_registry(settings: Settings) -> Seen:
    """One look at what the registry asks for; deliveries are started for it. Raises PortError."""
    ports = connect(settings)
    if settings.prefect_url is None:
        end_dead()  # a run that nobody ends would stand before its wish for ever
    return look(ports.registry, ports.ledger, PrefectRuns(), settings.shelf, ports.clock.now)


def cancelled(runs: Collection[str]) -> set[str]:
    """Those of the flow runs, by id, that somebody has cancelled. Raises PortError, within seconds."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState
    from prefect.client.schemas.filters import FlowRunFilterStateType as Types
    from prefect.client.schemas.objects import StateType

    if not runs:
        return set()
    states = FlowRunFilterState(type=Types(any_=[StateType.CANCELLING, StateType.CANCELLED]))
    with prefect_client() as server:
        found = server.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[*runs]), state=states))
    return {str(each.id) for each in found}


def end_dead() -> list[str]:
    """Runs whose process on this machine is gone have crashed, so that nobody waits for them; their names.

    A worker that lives says so itself; one that was killed together with its runs cannot. Only for a server whose
    workers are all on this machine: a run's process is known by its number alone. Raises PortError.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterTags
    from prefect.client.schemas.filters import FlowRunFilterStateType as Types
    from prefect.client.schemas.objects import State, StateType
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    ended = []
    under_way = FlowRunFilterState(type=Types(any_=[StateType.RUNNING, StateType.CANCELLING]))
    with prefect_client() as server:
        for each in server.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[POOL]), state=under_way)
        ):
            pid = each.infrastructure_pid
            if pid is None or not pid.isdecimal() or psutil.pid_exists(int(pid)):
                continue
            with suppress(ObjectNotFound):  # somebody has deleted it meanwhile
                state = server.read_flow_run(each.id).state  # it may have ended, and said so, since it was listed
                if state is None or state.is_final():
                    continue
                why = "its process is gone; the ledger says what became of the rollout"
                after: State[Any] = Cancelled(message=why) if state.is_cancelling() else Crashed(message=why)
                server.set_flow_run_state(each.id, after, force=True)
                ended.append(each.name)
    return ended


def _tag(wish: Wish) -> str:
    return f"asked: {wish.key}"


def _run(found: Any) -> Run:
    state = found.state
    ended = state.timestamp.timestamp() if state is not None and state.is_final() else None
    return Run(ended, state is not None and state.is_cancelled())
