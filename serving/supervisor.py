"""Keeps one process of a model server running: start, probe, restart with back-off, stop.

A replica is ready while it answers `GET /v2/health/ready` with 200. One that stops, because it is silent or because
its model hangs, is not ready after `PROBES_FAILED_MAX` probes, and is killed and started anew after `SILENT_S_MAX`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from serving.launcher import ZYGOTE, Launcher
from serving.processes import Process, last_words, listening_on

START_S_MAX = 120.0  # loading a large model may take that long
PROBE_S = 1.0
PROBE_TIMEOUT_S = 1.0
PROBES_FAILED_MAX = 3
SILENT_S_MAX = 20.0
BACK_OFF_S = 0.05
BACK_OFF_S_MAX = 10.0
STEADY_S = 10.0  # having run for so long, the next failure counts as the first
DRAIN_S = 15.0
FAILURES_UNTIL_FAILED = 3


@dataclass(frozen=True)
class VersionSpec:
    """What was asked to be deployed."""

    model: str
    version: str
    digest: str
    replicas: int = 1
    threads: int = 1
    prediction_output: str | None = None
    prediction_column: int = -1
    sample_share: float = 1.0
    # Other keys for the same bytes make no other version of them.
    signature: str | None = field(default=None, compare=False)
    signed_by: Sequence[str] = field(default=(), compare=False)

    def fingerprint(self) -> str:
        """A name for exactly this specification: a process with another one is not adopted."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Places:
    """Where a replica's files are, and how a server is started."""

    sockets: Path
    logs: Path
    samples: Path
    model: Path


Tell = Callable[..., None]  # (kind, says, **facts)


class Replica:
    """One model server process, kept running until `stop`."""

    def __init__(self, spec: VersionSpec, number: int, places: Places, launcher: Launcher, tell: Tell) -> None:
        self.spec = spec
        self.number = number
        self.ready = False
        self.restarts = 0
        self.failures = 0  # in a row, without having been ready
        self.why = "starting"
        self.process: Process | None = None
        self._places = places
        self._launcher = launcher
        self._tell = tell
        self._stopping = False
        self._starting = asyncio.Lock()
        # The name stands for the whole specification: whoever listens there is exactly this replica.
        name = hashlib.sha256(self.what.encode()).hexdigest()[:12]
        self.socket = places.sockets / f"{name}.sock"
        self.log = places.logs / f"{name}.log"
        self._task: asyncio.Task[None] | None = None

    @property
    def what(self) -> str:
        """The mark by which this replica's process is found again."""
        return f"server|{self.spec.model}|{self.spec.version}|{self.number}|{self.spec.fingerprint()}"

    @property
    def endpoint(self) -> str:
        return f"unix:{self.socket}"

    def begin(self, survivor: Process | None = None) -> None:
        """Runs it from now on, going on with the survivor if there is one."""
        self.process = survivor
        self._task = asyncio.create_task(self._run(), name=self.what)

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Drains it, for so long at most, and ends it; returns once it is gone."""
        self._stopping = True
        self.ready = False
        async with self._starting:  # a process that is just being started is not lost sight of
            process = self.process
        if process is not None:
            await process.stop(drain_s)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.socket.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        process = self.process
        return {
            "pid": process.pid if process else None,
            "endpoint": self.endpoint,
            "ready": self.ready,
            "restarts": self.restarts,
            "started_at": process.started_at if process else None,
        }

    async def _run(self) -> None:
        connector = aiohttp.UnixConnector(path=str(self.socket), force_close=True)
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while not self._stopping:
                began = time.monotonic()
                if self.process is None and not await self._start():
                    await asyncio.sleep(self._back_off())
                    continue
                process = self.process
                assert process is not None
                await self._watch(process, session)
                if self._stopping:
                    return
                steady = time.monotonic() - began > STEADY_S
                self._ended(await self._launcher.exit_code(process), steady)
                await asyncio.sleep(self._back_off())

    async def _start(self) -> bool:
        async with self._starting:
            if self._stopping:
                return False
            self.socket.unlink(missing_ok=True)
            try:
                self.process = await self._launcher.launch(self._arguments(), self.what, self.log)
            except OSError as exc:
                self.failures += 1
                self.why = f"cannot be started: {exc.strerror or exc}: {last_words(self.log)}"
                return False
        return True

    def _arguments(self) -> list[str]:
        spec, places = self.spec, self._places
        command = ["--model", spec.model, "--version", spec.version]
        command += ["--path", str(places.model), "--digest", spec.digest, "--uds", str(self.socket)]
        command += ["--threads", str(spec.threads), "--prediction-column", str(spec.prediction_column)]
        command += ["--samples", str(places.samples), "--sample-share", str(spec.sample_share)]
        if spec.prediction_output is not None:
            command += ["--prediction-output", spec.prediction_output]
        if spec.signature is not None:
            command += ["--signature", spec.signature, *(f"--signed-by={key}" for key in spec.signed_by)]
        return command

    async def _watch(self, process: Process, session: aiohttp.ClientSession) -> None:
        """Returns once the process has ended, on its own or because it was not ready for too long."""
        answered_at = time.monotonic()
        failed = 0
        been_ready = False
        while not process.exited.is_set():
            status = await self._probe(session)
            been_ready = been_ready or status is not None
            if status == 200:
                answered_at, failed = time.monotonic(), 0
                self._became_ready()
            else:
                failed += 1
                if failed >= PROBES_FAILED_MAX and self.ready:
                    self.ready = False
                    self.why = f"was not ready at {failed} probes in a row"
                    self._tell("replica-silent", f"{self._name()} {self.why}", **self._facts())
                if time.monotonic() - answered_at > (SILENT_S_MAX if been_ready else START_S_MAX):
                    self._tell(
                        "replica-killed", f"{self._name()} was not ready for too long and is killed", **self._facts()
                    )
                    await process.stop(0.0)
            pause = PROBE_S if been_ready else 0.02
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.exited.wait(), pause)
        self.ready = False

    async def _probe(self, session: aiohttp.ClientSession) -> int | None:
        """200: it is ready. Another status: it was, since it answers nobody before. None: not there, or silent."""
        try:
            async with session.get("http://replica/v2/health/ready") as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    def _became_ready(self) -> None:
        if self.ready or self._stopping:
            return
        self.ready = True
        self.failures = 0
        self.why = ""
        self._tell("replica-ready", f"{self._name()} is ready", **self._facts())

    def _ended(self, code: int | None, steady: bool) -> None:
        how = "ended" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        words = last_words(self.log)
        self.why = f"{how}; its log ends: {words}" if words else how
        self.process = None
        self.restarts += 1
        self.failures = 1 if steady else self.failures + 1
        self._tell("replica-ended", f"{self._name()} {self.why}", **self._facts())

    def _back_off(self) -> float:
        """Nothing after the first failure: somebody is waiting. Then doubling."""
        if self.failures <= 1:
            return 0.0
        return float(min(BACK_OFF_S * 2 ** (self.failures - 2), BACK_OFF_S_MAX))

    def _name(self) -> str:
        return f"replica {self.number} of {self.spec.model} version {self.spec.version}"

    def _facts(self) -> dict[str, Any]:
        return {"model": self.spec.model, "version": self.spec.version, "replica": self.number}


class VersionRunner:
    """All replicas of one deployed version."""

    def __init__(self, spec: VersionSpec, places: Places, launcher: Launcher, tell: Tell) -> None:
        self.spec = spec
        self.samples = places.samples
        self.stopping = False
        self.suspended = False
        self._places = places
        self._launcher = launcher
        self._tell = tell
        self.replicas = self._new_replicas()

    def _new_replicas(self) -> list[Replica]:
        spec = self.spec
        return [Replica(spec, number, self._places, self._launcher, self._tell) for number in range(spec.replicas)]

    def begin(self, survivors: dict[str, list[Process]]) -> None:
        """Starts the replicas; those that survived are taken over and removed from `survivors`."""
        for replica in self.replicas:
            replica.begin(_survivor(replica, survivors))

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Drains and ends all replicas."""
        self.stopping = True
        await asyncio.gather(*(replica.stop(drain_s) for replica in self.replicas))

    async def suspend(self) -> None:
        """Ends all replicas at once, until `resume`: what is under way on this version, and what still comes for it,
        fails, and is answered by the stable one."""
        self.suspended = True
        await self.stop(0.0)

    def resume(self) -> None:
        """Runs the replicas again after `suspend`."""
        self.suspended = self.stopping = False
        self.replicas = self._new_replicas()
        self.begin({})

    @property
    def ready(self) -> int:
        return sum(replica.ready for replica in self.replicas)

    def status(self) -> dict[str, Any]:
        why = next((replica.why for replica in self.replicas if replica.why), "")
        return {
            "digest": self.spec.digest,
            "state": self._state(),
            "why": why,
            "replicas": [replica.status() for replica in self.replicas],
            "samples": str(self.samples),
        }

    def _state(self) -> str:
        if self.stopping:
            return "stopping"
        if all(replica.ready for replica in self.replicas):
            return "ready"
        if any(replica.failures >= FAILURES_UNTIL_FAILED for replica in self.replicas):
            return "failed"
        return "starting"


def _survivor(replica: Replica, survivors: dict[str, list[Process]]) -> Process | None:
    """The replica's process among the survivors, from which it is removed: one that bears its mark, or one that was
    forked from the zygote and listens on its socket."""
    marked = survivors.get(replica.what, [])
    if marked:
        return marked.pop()
    forked = survivors.get(ZYGOTE, [])
    pid = listening_on(replica.socket) if forked else None
    found = next((process for process in forked if process.pid == pid), None)
    if found is not None:
        forked.remove(found)
    return found
