"""The platform's worker: brings what is ours to the Prefect server, then runs what is asked for, a process a run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from flows.settings import Settings
from flows.wiring import announce, configure

_POLLS_S = "1"


def main() -> None:
    """Works until SIGTERM; then its runs are told to end, and given some seconds for it."""
    settings = Settings()
    configure(settings)
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", _POLLS_S)
    from flows import automations, deployments

    deployments.apply(settings.deliveries_at_once, settings.monitor_cron)
    automations.apply()
    asyncio.run(_work(settings, deployments.POOL))


async def _work(settings: Settings, pool: str) -> None:
    from prefect.workers.process import ProcessWorker

    here = asyncio.current_task()
    assert here is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)
    worker = ProcessWorker(work_pool_name=pool, name="lockgate up")
    with contextlib.suppress(asyncio.CancelledError):
        await worker.start(printer=lambda *_: announce(settings, "flows.worker"))


if __name__ == "__main__":
    main()
