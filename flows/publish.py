"""What a person sees of a rollout in the Prefect UI: its run's name, a progress bar, a page, a table of its stages.

Publishing happens beside the rollout, in a thread of its own: a slow or absent Prefect server delays no decision. Only
how things stand now is published; what could not be is said once at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

from flows.lingering import linger
from flows.page import Seen, Shown, page, stages, title
from flows.rollout import Progress
from flows.story import run_of, share_done, target_of
from flows.wiring import prefect_client
from tasks.ports import Ledger

_EVERY_S = 4.0
_LAST_TRIES, _LAST_EVERY_S = 3, 1.0  # at the end, which nothing newer follows
_TIMEOUT_S = 10.0
_WAIT_S = 5.0
log = logging.getLogger("lockgate.publish")

Links = Callable[[str, str], Mapping[str, str]]  # of a model and its version


def artifact_key(model: str, what: str) -> str:
    """The key of the model's artifact: no other model has it.

    Prefect's keys hold lower-case letters, digits and dashes only. A name that has others is told apart by its hash.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if slug != model:
        slug = f"{slug}-{hashlib.sha256(model.encode()).hexdigest()[:8]}".strip("-")
    return f"{slug}-{what}"


class Publisher:
    """An observer of one rollout that writes to the Prefect API; `close` when the rollout has ended."""

    def __init__(
        self,
        flow_run: UUID | None,
        target: str,
        ledger: Ledger | None = None,
        links: Links = lambda _model, _version: {},
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """`then` is called after each move that was published, in the publisher's thread, until it succeeds."""
        self.flow_run, self.target, self.ledger, self.links, self.then = flow_run, target, ledger, links, then
        self._newest: Progress | None = None
        self._look: Progress | None = None
        self._more: dict[str, str] = {}
        self._published: Progress | None = None
        self._name, self._moved_by, self._passed_on = "", 0, 0
        self._artifacts: dict[str, UUID] = {}
        self._problem = ""
        self._due, self._closing, self._late = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="publish", daemon=True)
        self._thread.start()

    def __call__(self, progress: Progress) -> None:
        """Never waits."""
        if progress.reports:
            self._look = progress
        moved = self._newest is None or progress.state.label != self._newest.state.label
        self._newest = progress
        if moved:
            self._due.set()

    def link(self, name: str, to: str) -> None:
        """The page has this link, too."""
        self._more[name] = to
        self._published = None

    def close(self, wait_s: float = _WAIT_S) -> None:
        """Publishes how it stands at the end, for at most `wait_s` seconds; then the thread ends at its next answer."""
        self._closing.set()
        self._due.set()
        self._thread.join(wait_s)
        self._late.set()
        linger(self._thread)
        problem = self._problem or (f"no answer in {wait_s:.0f} s" if self._thread.is_alive() else "")
        if problem:
            log.warning("the Prefect server was not told all; the ledger has it: %s", problem)

    def _work(self) -> None:
        while not self._closing.is_set():
            self._due.wait(_EVERY_S)
            self._due.clear()
            self._bring_up_to_date()
        for tried in range(_LAST_TRIES):
            if self._late.wait(_LAST_EVERY_S if tried else 0.0):
                return
            self._bring_up_to_date()
            if not self._problem:
                return

    def _bring_up_to_date(self) -> None:
        """What fails is tried again, with whatever is newest then: whatever it is, as nobody restarts the thread."""
        newest = self._newest
        if newest is None:
            return
        try:
            if newest is not self._published:
                self._published = newest  # before it is: `link` may say meanwhile that there is more
                with prefect_client(_TIMEOUT_S) as server:
                    self._publish(server, newest)
        except Exception as exc:  # noqa: BLE001 - as said above
            self._published = None
            self._artifacts.clear()  # somebody may have deleted one
            self._problem = f"{type(exc).__name__}: {exc}"
            return
        try:
            if self._moved_by != self._passed_on:
                self.then()
                self._passed_on = self._moved_by
            self._problem = ""
        except Exception as exc:  # noqa: BLE001 - as above; what was published need not be published again
            self._problem = f"{type(exc).__name__}: {exc}"

    def _publish(self, client: SyncPrefectClient, progress: Progress) -> None:
        state = progress.state
        name = title(state, self.target)
        if name != self._name and self.flow_run is not None:
            client.set_flow_run_name(self.flow_run, name)
            self._name = name
        self._show(
            client,
            state.model,
            "rollout",
            "markdown",
            page(self._shown(progress)),
            "How it stands; rewritten at each look.",
        )
        if state.moved_by == self._moved_by:
            return
        self._show(client, state.model, "progress", "progress", share_done(state), name)
        if self.ledger is not None:
            table = json.dumps(stages(self.ledger.read(progress.rollout)))
            self._show(
                client, state.model, "stages", "table", table, f"{state.model} v{state.candidate}, stage by stage"
            )
        self._moved_by = state.moved_by

    def _shown(self, progress: Progress) -> Shown:
        state, look = progress.state, self._look
        links = {**self.links(state.model, state.candidate), **self._more}
        shown = Shown(progress.rollout, state, self.target, progress.event.at, links=links)
        if look is None:
            return shown
        seen = Seen(look.event.at, look.reports, look.evidence, look.nearest())
        return replace(shown, seen=seen)

    def _show(self, client: SyncPrefectClient, model: str, what: str, kind: str, data: Any, said: str) -> None:
        """One artifact of each kind for a rollout, rewritten; also where another process has made it."""
        if self._late.is_set():
            raise TimeoutError("nobody waits for it any more")
        key = artifact_key(model, what)
        known = self._artifacts.get(what) or self._made_before(client, key)
        if known is None:
            made = client.create_artifact(
                ArtifactCreate(type=kind, key=key, description=said, data=data, flow_run_id=self.flow_run)
            )
            known = made.id
        else:
            client.update_artifact(known, ArtifactUpdate(data=data, description=said))
        self._artifacts[what] = known

    def _made_before(self, client: SyncPrefectClient, key: str) -> UUID | None:
        """The artifact of the run that another process has made, which drove the rollout before."""
        if self.flow_run is None:
            return None
        wanted = ArtifactFilter(
            key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[self.flow_run])
        )
        found = client.read_artifacts(artifact_filter=wanted)
        return found[0].id if found else None


@contextmanager
def showing(ledger: Ledger, links: Links, rollout: str) -> Iterator[Publisher]:
    """An observer of a rollout whose controller is gone, as long as another drives it: what its run shows goes on.

    Raises PortError if the ledger cannot be read.
    """
    entries = ledger.read(rollout)
    run = run_of(entries)
    publisher = Publisher(UUID(run) if run else None, target_of(entries), ledger, links)
    try:
        yield publisher
    finally:
        publisher.close()
