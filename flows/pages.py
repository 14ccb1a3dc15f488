"""Evidently's page on each stage that a rollout has left, made beside the rollout.

An observer of the controller only notes that a stage is over. The rest, from reading the rows to keeping the page with
the version's run, happens in a thread of its own, and the page in a worker process: no decision and no rollback waits
for it, and what cannot be made is one line on the record.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.lingering import linger
from flows.orders import write
from flows.rollout import Progress
from policies import audit
from policies.events import LOOKED_AT, Noted
from policies.rollout import Rollout
from tasks.ports import PortError, Ports

_SETTLE_S = 2.0  # the servers write their samples every second
log = logging.getLogger("lockgate.pages")


@dataclass(frozen=True)
class _Stage:
    """A stretch of a rollout in which looks counted."""

    state: Rollout
    what: str
    since: float
    until: float = 0.0


class Pages:
    """An observer of one rollout; `close` when it has ended. `who` names it in the ledger."""

    def __init__(self, ports: Ports, who: str, settle_s: float = _SETTLE_S) -> None:
        self._ports, self._who, self._settle_s = ports, who, settle_s
        self._stage: _Stage | None = None
        self._queue: queue.Queue[tuple[str, _Stage] | None] = queue.Queue()  # as long as a rollout has stages
        self._unmade: list[tuple[str, _Stage]] = []
        self._untold: list[tuple[str, Noted]] = []  # what became of them, oldest first, as long as it is not written
        self._noting = threading.Lock()  # whoever takes one of these out, notes what became of it
        self._thread: threading.Thread | None = None

    def __call__(self, progress: Progress) -> None:
        """Never waits."""
        state, stage = progress.state, self._stage
        if stage is not None and state.moved_by != stage.state.moved_by:
            asked = progress.rollout, replace(stage, until=progress.event.at)
            self._unmade.append(asked)
            self._queue.put(asked)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pages", daemon=True)
                self._thread.start()
            self._stage = stage = None
        if stage is None and state.phase in LOOKED_AT and state.in_force and state.stable is not None:
            self._stage = _Stage(state, state.label, progress.event.at)

    def close(self, wait_s: float) -> None:
        """Makes the pages that are still to be made, for at most `wait_s` seconds; the others are told."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(wait_s)
        linger(self._thread)
        with self._noting:  # what is being told is told before this returns
            left = list(self._unmade)
        for asked in left:
            self._note(asked, Noted(0.0, 0, asked[1].what, error=f"not made in {wait_s:g} s after the rollout's end"))
        with self._noting:
            why = self._tell()
            for name, noted in self._untold:
                log.warning("the page on %s of %s could not be noted: %s", noted.what, name, why)
            self._untold.clear()

    def _work(self) -> None:
        while (asked := self._queue.get()) is not None:
            name, stage = asked
            if self._settle_s > 0:
                self._ports.clock.sleep(self._settle_s)
            if asked not in self._unmade:  # nobody waits for it any more
                continue
            try:
                noted = Noted(0.0, 0, stage.what, link=self._made(name, stage))
            except Exception as exc:  # noqa: BLE001 - a disk that is full, too; nobody restarts this thread
                noted = Noted(0.0, 0, stage.what, error=str(exc) or type(exc).__name__)
            self._note(asked, noted)

    def _made(self, name: str, stage: _Stage) -> str:
        """The page's link, once it is kept with the version's run."""
        state, pages = stage.state, self._ports.pages
        assert pages is not None
        assert state.stable is not None
        slug = re.sub(r"[^a-z0-9]+", "-", stage.what.lower()).strip("-")
        with TemporaryDirectory(prefix="lockgate-page-") as folder:
            path = Path(folder) / f"{name}-{stage.state.moved_by}-{slug}-evidently.html"
            page = pages.write(state.model, state.stable, state.candidate, stage.since, stage.until, path)
            return self._ports.registry.record(self._ports.registry.version(state.model, state.candidate), {}, [page])

    def _note(self, asked: tuple[str, _Stage], noted: Noted) -> None:
        """Writes it down, unless the other thread has done so."""
        with self._noting:
            if asked not in self._unmade:
                return
            self._unmade.remove(asked)
            if noted.error:
                log.warning("no page on %s of %s: %s", noted.what, asked[0], noted.error)
            self._untold.append((asked[0], noted))
            self._tell()

    def _tell(self) -> str:
        """Writes down what is not written yet; why the rest has to wait, if the ledger does not take it now."""
        while self._untold:
            name, noted = self._untold[0]
            try:
                write(self._ports.ledger, name, self._who, partial(self._now, noted))
            except PortError as exc:
                return str(exc)
            except ValueError as exc:
                log.warning("the page on %s of %s could not be noted: %s", noted.what, name, exc)
            del self._untold[0]
        return ""

    def _now(self, noted: Noted) -> Noted:
        """As it can be kept, at this moment."""
        return Noted(self._ports.clock.now(), 0, noted.what, audit.clean(noted.link), audit.clean(noted.error))
