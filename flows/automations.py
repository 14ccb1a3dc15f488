"""The automations that a platform brings to its Prefect server, known by their names.

What they are about is done without them, too: after a crash by the reconciler of `lockgate up`, on an alarm by
`monitor` itself, as the policy says. The first is for workers elsewhere, the second for people to add actions to.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flows.deployments import POOL

CRASHED = "lockgate: after a crash"
ALARM = "lockgate: an alarm of the monitor"
_ALARMS = {f"lockgate.monitor.{kind}" for kind in ("drift", "data", "quality")}


def apply() -> None:
    """Both are on the Prefect server. What somebody has turned off stays off, and the alarm's is not changed."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as server:
        reconcile = server.read_deployment_by_name("reconcile/reconcile").id
        (crashed, *_) = [*server.read_automations_by_name(CRASHED), None]
        if crashed is None:
            server.create_automation(_after_crash(reconcile))
        else:
            wanted = _after_crash(reconcile).model_copy(update={"enabled": crashed.enabled})
            server.update_automation(crashed.id, wanted)
        if not server.read_automations_by_name(ALARM):
            server.create_automation(_on_alarm())


def _after_crash(reconcile: UUID) -> Any:
    """A delivery's or a rollback's run that has crashed: its rollout is taken over."""
    from prefect.automations import AutomationCore, EventTrigger, Posture, ResourceSpecification, RunDeployment

    ours = {"prefect.resource.role": "flow", "prefect.resource.name": ["deliver", "rollback"]}
    run = {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}
    return AutomationCore(
        name=CRASHED,
        description="Takes over the rollout of a delivery whose run has crashed, where nobody has done so yet.",
        enabled=True,
        tags=[POOL],
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification.model_validate(ours),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[RunDeployment(source="selected", deployment_id=reconcile, parameters={"crashed": run})],
    )


def _on_alarm() -> Any:
    """An alarm of the monitor has begun. Nothing happens: the place to add, say, a notification."""
    from prefect.automations import AutomationCore, DoNothing, EventTrigger, Posture, ResourceSpecification

    return AutomationCore(
        name=ALARM,
        description="Add what else shall happen, say a notification: rollback and retraining are the policy's.",
        enabled=True,
        tags=[POOL],
        trigger=EventTrigger(
            expect=_ALARMS,
            match=ResourceSpecification.model_validate({"prefect.resource.id": "lockgate.model.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[DoNothing()],
    )
