"""Herald: events and runs on the Prefect server.

Events are posted and confirmed, unlike those of `prefect.events.emit_event`, which are dropped where the server does
not answer; the server takes an event's id, and a run's idempotency key, only once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from infra.client_prefect import client
from policies import audit
from tasks.ports import Ledger, NotThere
from tasks.ports_monitor import Notice

_TOLD = "lockgate_told"  # a Prefect variable: how far a ledger's events were told is known where they are told
_TIMEOUT_S = 15.0
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, "lockgate")


class PrefectHerald:
    """`tasks.ports_monitor.Herald` on the server that Prefect's own settings name; of one ledger, if of any."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger, self._variable = ledger, ""

    def tell(self, notice: Notice) -> None:
        model, version, rollout = notice.model, notice.version, notice.rollout
        about = {"prefect.resource.id": f"lockgate.model.{model}", "prefect.resource.name": model}
        related = [_related("version", f"lockgate.version.{model}.{version}", f"{model} v{version}")]
        if rollout:
            related.append(_related("model", f"lockgate.model.{model}", model))
            about = {
                "prefect.resource.id": f"lockgate.rollout.{rollout}",
                "prefect.resource.name": f"{model} v{version}",
                "lockgate.model": model,
            }
        body = {
            "id": str(uuid.uuid5(_NAMES, f"{notice.key} {notice.event}")),
            "event": notice.event,
            "occurred": datetime.fromtimestamp(notice.at, UTC).isoformat(),
            "resource": {**about, "lockgate.version": version},
            "related": [*related, *_flow_run(notice.flow_run)],
            "payload": dict(notice.payload),
        }
        body = audit.clean(body)  # a ledger may hold an older entry whose text no JSON can carry
        with client(_TIMEOUT_S, f"the event {notice.event} did not reach the Prefect server") as server:
            server.request("POST", "/events", json=[body])

    def told_up_to(self) -> int | None:
        with client(_TIMEOUT_S, "what was told cannot be read") as server:
            found = server.read_variable_by_name(self._told()) or server.read_variable_by_name(_TOLD)
        return found.value if found is not None and isinstance(found.value, int) else None

    def note_told(self, number: int) -> None:
        from prefect.client.schemas.actions import VariableCreate, VariableUpdate

        name = self._told()
        with client(_TIMEOUT_S, "what was told cannot be noted") as server:
            if server.read_variable_by_name(name) is not None:
                server.update_variable(VariableUpdate(name=name, value=number))
                return
            server.create_variable(VariableCreate(name=name, value=number))
            if name != _TOLD and server.read_variable_by_name(_TOLD) is not None:
                server.delete_variable_by_name(_TOLD)  # it was this ledger's, and says nothing of another one

    def _told(self) -> str:
        """The variable's name. Several ledgers may tell one server: each is known by how it began.

        One that holds nothing yet has no name of its own, and takes what was noted with it when it gets one.
        """
        if self._ledger is None or self._variable:
            return self._variable or _TOLD
        names = self._ledger.rollouts()
        if not names:
            return _TOLD
        self._variable = f"{_TOLD}_{self._ledger.read(names[-1])[0].hash[:12]}"
        return self._variable

    def start(self, key: str, deployment: str, parameters: Mapping[str, object]) -> str:
        from prefect.exceptions import ObjectNotFound

        with client(_TIMEOUT_S, f"no run of '{deployment}' could be created") as server:
            try:
                found = server.read_deployment_by_name(deployment)
            except ObjectNotFound as exc:
                raise NotThere(f"the Prefect server has no deployment '{deployment}'") from exc
            run = server.create_flow_run_from_deployment(
                found.id, parameters=dict(parameters), idempotency_key=str(uuid.uuid5(_NAMES, key))
            )
        return str(run.name)


def _related(role: str, name: str, shown: str) -> dict[str, str]:
    return {"prefect.resource.id": name, "prefect.resource.name": shown, "prefect.resource.role": role}


def _flow_run(known: str | None) -> list[dict[str, str]]:
    """The flow run that it belongs to: the one that is known, else the one that tells, if one does."""
    if known is not None:
        return [_related("flow-run", f"prefect.flow-run.{known}", known)]
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return [_related("flow-run", f"prefect.flow-run.{run.id}", run.name)] if run is not None else []
