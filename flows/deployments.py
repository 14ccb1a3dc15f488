"""The deployments that a platform has, and how they come to its Prefect server.

One list, `ALL`; `infra/prefect.yaml` says the same for `prefect deploy`, and a test keeps both equal. Whatever runs
them needs this package installed and `LOCKGATE_*` set: entry points are modules, so nothing is pulled from anywhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

POOL = "lockgate"
QUEUE = "default"  # whatever must not wait
DELIVERIES = "deliveries"  # at most so many at once as the settings say


@dataclass(frozen=True)
class Deployed:
    """One deployment, `NAME/NAME`: the flow at `entrypoint`, when it runs by itself, and in which queue it waits."""

    name: str
    entrypoint: str
    description: str
    queue: str = QUEUE
    interval_s: float | None = None
    cron: str | None = None


ALL = (
    Deployed(
        "deliver",
        "flows.deliver.deliver",
        "Checks a version, lets live traffic onto it step by step, and promotes it or takes it back.",
        queue=DELIVERIES,
    ),
    Deployed(
        "rollback",
        "flows.rollback.rollback",
        "Back to the former version: aborts a delivery under way, or brings the last proven version back.",
    ),
    Deployed(
        "reconcile",
        "flows.reconcile.reconcile",
        "Rollouts that nobody drives go on, and what was left over is mended. `lockgate up` does so all the time.",
        interval_s=600.0,
    ),
    Deployed(
        "rehearse",
        "flows.rehearse.rehearse",
        "A dry run of a policy on recorded traffic: how a candidate would have gone, and why. Nothing is deployed.",
    ),
    Deployed(
        "monitor",
        "flows.monitor.monitor",
        "Looks at every model that serves and is due: drift, the data's contract, quality as labels come.",
        cron="7 * * * *",
    ),
    Deployed(
        "approval",
        "flows.form.approval",
        "Asks people whether a rollout may go on, where its policy says so. Starts by itself; resume a run to answer.",
    ),
)


def flow_of(deployed: Deployed) -> Any:
    """The flow at the deployment's entry point."""
    module, _, name = deployed.entrypoint.rpartition(".")
    return getattr(import_module(module), name)


def apply(deliveries_at_once: int, monitor_cron: str) -> None:
    """Work pool, queues and deployments are on the Prefect server as they are here. Idempotent."""
    from prefect.types.entrypoint import EntrypointType

    _pool(deliveries_at_once)
    for each in ALL:
        made = flow_of(each).to_deployment(
            name=each.name,
            description=each.description,
            interval=each.interval_s,
            cron=monitor_cron if each.cron else None,
            tags=[POOL],
            work_pool_name=POOL,
            work_queue_name=each.queue,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        made.apply()


def _pool(deliveries_at_once: int) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    # With a command of its own the worker starts it directly. Else it starts a process that looks for the code first,
    # and that one starts another: Prefect is imported twice, which takes twice as long.
    template["variables"]["properties"]["command"]["default"] = f"{sys.executable} -m prefect.engine"
    with get_client(sync_client=True) as client:
        pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template)
        client.create_work_pool(pool, overwrite=True)
        try:
            queue = client.read_work_queue_by_name(DELIVERIES, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=deliveries_at_once)
        except ObjectNotFound:
            client.create_work_queue(DELIVERIES, concurrency_limit=deliveries_at_once, work_pool_name=POOL)
