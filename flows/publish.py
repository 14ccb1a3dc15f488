"""What a person sees of a rollout in the Prefect UI: the run's name, a progress bar, a table at each look.

Publishing happens beside the rollout, in a thread of its own: a slow or absent Prefect server delays no decision.
What could not be published is counted and said once at the end.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import PrefectHTTPStatusError

from flows.rollout import Progress
from flows.story import share_done
from policies.events import Looked
from policies.verdict import GateReport

_EVERY_S = 2.0
_QUEUE = 200
log = logging.getLogger("lockgate.publish")


def rows(reports: tuple[GateReport, ...]) -> list[dict[str, Any]]:
    """The gates' reports as a table for people."""
    return [
        {
            "gate": report.gate,
            "verdict": str(report.verdict),
            "estimate": _number(report.estimate),
            "interval": f"{_number(report.low)} .. {_number(report.high)}",
            "threshold": _number(report.threshold),
            "unit": report.unit,
            "n": report.n,
            "says": report.says,
            "needs": report.needs,
        }
        for report in reports
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def artifact_key(*parts: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class Publisher:
    """An observer of one rollout that writes to the Prefect API; `close` when the rollout has ended."""

    def __init__(self, flow_run: UUID | None, target: str) -> None:
        self.flow_run = flow_run
        self.target = target
        self.failures = 0
        self._queue: queue.Queue[Progress | None] = queue.Queue(_QUEUE)
        self._progress_artifact: UUID | None = None
        self._name = ""
        self._published_at = 0.0
        self._thread = threading.Thread(target=self._work, name="publish", daemon=True)
        self._thread.start()

    def __call__(self, progress: Progress) -> None:
        """Never waits: with the queue full, this one is not published."""
        try:
            self._queue.put_nowait(progress)
        except queue.Full:
            self.failures += 1

    def close(self, wait_s: float = 5.0) -> None:
        """Publishes what is left, for at most `wait_s` seconds."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self.failures += 1
        self._thread.join(wait_s)
        if self.failures:
            log.warning("%d updates did not reach the Prefect server; the ledger has them all", self.failures)

    def _work(self) -> None:
        with get_client(sync_client=True) as client:
            while (progress := self._queue.get()) is not None:
                try:
                    self._publish(client, progress)
                except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
                    self.failures += 1
                    log.debug("not published: %s", exc)

    def _publish(self, client: SyncPrefectClient, progress: Progress) -> None:
        state = progress.state
        name = f"{state.model} v{state.candidate} → {self.target}: {state.label}"
        if name != self._name and self.flow_run is not None:
            client.set_flow_run_name(self.flow_run, name)
            self._name = name
            self._bar(client, progress)
        decided = not state.in_force  # this look moved the rollout on: the one that people will ask about
        if isinstance(progress.event, Looked) and (decided or time.monotonic() - self._published_at >= _EVERY_S):
            self._published_at = time.monotonic()
            self._table(client, progress)

    def _bar(self, client: SyncPrefectClient, progress: Progress) -> None:
        state = progress.state
        if self._progress_artifact is not None:
            client.update_artifact(self._progress_artifact, ArtifactUpdate(data=share_done(state)))
            return
        made = client.create_artifact(
            ArtifactCreate(
                type="progress",
                key=artifact_key(state.model, "progress"),
                description=f"Rollout of {state.model} v{state.candidate}",
                data=share_done(state),
                flow_run_id=self.flow_run,
            )
        )
        self._progress_artifact = made.id

    def _table(self, client: SyncPrefectClient, progress: Progress) -> None:
        state = progress.state
        client.create_artifact(
            ArtifactCreate(
                type="table",
                key=artifact_key(state.model, "gates"),
                description=f"{state.model} v{state.candidate}, {state.label}: **{state.verdict}**",
                data=json.dumps(rows(progress.reports)),
                flow_run_id=self.flow_run,
            )
        )
