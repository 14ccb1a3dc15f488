"""The automations that a platform brings to its Prefect server, known by their names.

What they are about is done without them, too: after a crash by the reconciler of `lockgate up`, on an alarm by
`monitor` itself, as the policy says. The first is for workers elsewhere, the second for people to add actions to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from flows.deployments import POOL

CRASHED = "lockgate: after a crash"
ALARM = "lockgate: an alarm of the monitor"
_ALARMS = {f"lockgate.monitor.{kind}" for kind in ("drift", "data", "quality")}


def apply() -> None:
    """Both are there, as somebody has left them; only a deployment that is gone gives way to `reconcile`."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as server:
        reconcile = server.read_deployment_by_name("reconcile/reconcile").id
        crashed = server.read_automations_by_name(CRASHED)
        if not crashed:
            server.create_automation(_after_crash(reconcile))
        for each in crashed:
            actions = [_pointed(server, action, reconcile) for action in each.actions]
            if actions != each.actions:
                server.update_automation(each.id, _like(each, actions))
        if not server.read_automations_by_name(ALARM):
            server.create_automation(_on_alarm())


def _pointed(server: Any, action: Any, reconcile: UUID) -> Any:
    """The action; where it runs a deployment that the server has no more, it runs `reconcile`."""
    from prefect.exceptions import ObjectNotFound

    if (known := getattr(action, "deployment_id", None)) is None:
        return action
    try:
        server.read_deployment(known)
    except ObjectNotFound:
        return action.model_copy(update={"deployment_id": reconcile})
    return action


def _like(found: Any, actions: list[Any]) -> Any:
    from prefect.automations import AutomationCore

    kept = {key: value for key, value in found if key not in ("id", "owner_resource")}  # an update may not say these
    return AutomationCore(**{**kept, "actions": actions})


def _after_crash(reconcile: UUID) -> Any:
    """A delivery's or a rollback's run that has crashed: its rollout is taken over."""
    from prefect.automations import RunDeployment

    run = {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}
    return _automation(
        CRASHED,
        "Takes over the rollout of a delivery whose run has crashed, where nobody has done so yet.",
        RunDeployment(source="selected", deployment_id=reconcile, parameters={"crashed": run}),
        expect={"prefect.flow-run.Crashed"},
        of="prefect.flow-run.*",
        related={"prefect.resource.role": "flow", "prefect.resource.name": ["deliver", "rollback"]},
    )


def _on_alarm() -> Any:
    """An alarm of the monitor has begun. Nothing happens: the place to add, say, a notification."""
    from prefect.automations import DoNothing

    why = "Add what else shall happen, say a notification: rollback and retraining are the policy's."
    return _automation(ALARM, why, DoNothing(), expect=_ALARMS, of="lockgate.model.*")


def _automation(
    name: str, description: str, action: Any, expect: set[str], of: str, related: Mapping[str, Any] | None = None
) -> Any:
    """The action at each such event of such a resource; `related`: of its related resources, one is like this."""
    from prefect.automations import AutomationCore, EventTrigger, Posture, ResourceSpecification

    like = ResourceSpecification.model_validate
    return AutomationCore(
        name=name,
        description=description,
        enabled=True,
        tags=[POOL],
        trigger=EventTrigger(
            expect=expect,
            match=like({"prefect.resource.id": of}),
            match_related=like(related or {}),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[action],
    )
