"""Herald: events and runs on the Prefect server.

Events are posted and confirmed, unlike those of `prefect.events.emit_event`, which are dropped where the server does
not answer; the server takes an event's id, and a run's idempotency key, only once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tasks.ports import NotThere, PortError

_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, "lockgate")


class PrefectHerald:
    """`tasks.ports_monitor.Herald` on the server that Prefect's own settings name."""

    def tell(self, key: str, event: str, model: str, version: str, at: float, payload: Mapping[str, object]) -> None:
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.exceptions import PrefectHTTPStatusError

        body = {
            "id": str(uuid.uuid5(_NAMES, f"{key} {event}")),
            "event": event,
            "occurred": datetime.fromtimestamp(at, UTC).isoformat(),
            "resource": {
                "prefect.resource.id": f"lockgate.model.{model}",
                "prefect.resource.name": model,
                "lockgate.version": version,
            },
            "related": [
                {"prefect.resource.id": f"lockgate.version.{model}.{version}", "prefect.resource.role": "version"},
                *_flow_run(),
            ],
            "payload": dict(payload),
        }
        try:
            with get_client(sync_client=True) as client:
                client.request("POST", "/events", json=[body])
        except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
            raise PortError(f"the event {event} did not reach the Prefect server: {exc}") from exc

    def start(self, key: str, deployment: str, parameters: Mapping[str, object]) -> str:
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

        try:
            with get_client(sync_client=True) as client:
                found = client.read_deployment_by_name(deployment)
                run = client.create_flow_run_from_deployment(
                    found.id, parameters=dict(parameters), idempotency_key=str(uuid.uuid5(_NAMES, key))
                )
        except ObjectNotFound as exc:
            raise NotThere(f"the Prefect server has no deployment '{deployment}'") from exc
        except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
            raise PortError(f"no run of '{deployment}' could be created: {exc}") from exc
        return str(run.name)


def _flow_run() -> list[dict[str, Any]]:
    """The flow run that tells, if one does."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None:
        return []
    return [
        {
            "prefect.resource.id": f"prefect.flow-run.{run.id}",
            "prefect.resource.name": run.name,
            "prefect.resource.role": "flow-run",
        }
    ]
