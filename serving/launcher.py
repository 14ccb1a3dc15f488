"""Starts model servers: by forking the zygote, which has imported everything, or as fresh processes.

A fork is ready in tens of milliseconds and shares the imports' memory; a fresh process needs about a second. The zygote
is never in the way: while it is not there, or refuses, servers are started fresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving.errors import CannotServe
from serving.processes import Process, bound, listening_on, mark, start
from serving.zygote import Zygote

SERVER = (sys.executable, "-m", "serving.server")
ZYGOTE = "zygote"  # its mark, which the processes forked from it carry, too
ZYGOTE_READY_S_MAX = 5.0
EXIT_KNOWN_S_MAX = 0.2  # somebody may be waiting for the next server

_log = logging.getLogger("lockgate.launcher")


class Launcher:
    """Starts the servers of one agent. With another `command` than ours, each is a fresh process."""

    def __init__(self, home: Path, command: Sequence[str] = SERVER) -> None:
        self._home = home
        self._command = tuple(command)
        self._socket = home / "run" / "zygote.sock"
        self._zygote: Process | None = None

    @property
    def forks(self) -> bool:
        return self._command == SERVER

    def begin(self) -> None:
        """Starts the zygote; it is ready some time later. That it cannot be started is no error."""
        if not self.forks:
            return
        self._socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "serving.zygote", "--uds", str(self._socket)]
        try:
            self._zygote = start(command, mark(self._home, ZYGOTE), self._home / "logs" / "zygote.log")
        except OSError as exc:
            _log.warning("the zygote cannot be started, so servers start slowly: %s", exc)

    async def stop(self) -> None:
        """Ends the zygote. The servers live on."""
        if self._zygote is not None:
            await self._zygote.stop(2.0)

    async def launch(self, arguments: Sequence[str], what: str, log: Path) -> Process:
        """A server with these arguments, its output in `log`. Raises OSError if it cannot start or ended at once."""
        if self.forks and await self._zygote_ready():
            bound(log)
            try:
                pid = await asyncio.to_thread(Zygote(self._socket).spawn, arguments, log)
                return Process(pid, time.time())
            except CannotServe as exc:
                _log.warning("started without the zygote: %s", exc)
        return start([*self._command, *arguments], mark(self._home, what), log)

    async def exit_code(self, process: Process) -> int | None:
        """How the server ended (-9: by signal 9), as far as that can be told at once; None: nobody knows."""
        if process.exit_code is not None or not self.forks:
            return process.exit_code
        with contextlib.suppress(CannotServe, TimeoutError):
            exits = await asyncio.wait_for(asyncio.to_thread(Zygote(self._socket).exits), EXIT_KNOWN_S_MAX)
            return exits.get(process.pid)
        return None

    async def _zygote_ready(self) -> bool:
        """Waits for it for a bounded time. One that has ended is started anew, for the next server."""
        if self._zygote is None or self._zygote.exited.is_set():
            self.begin()
            return False
        deadline = time.monotonic() + ZYGOTE_READY_S_MAX
        while time.monotonic() < deadline and not self._zygote.exited.is_set():
            if listening_on(self._socket) is not None:
                return True
            await asyncio.sleep(0.02)
        return False
