"""Child processes that outlive the agent, and are found again after it was killed.

Each child is started in a session of its own and carries a mark in its environment: the agent's home and what the child
is. A restarted agent looks through the process table for its marks. No list of process ids is written down, so none can
be stale: a mark belongs to the process itself, and an id that was given to another process has another mark.
Linux only (pidfd).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MARK = "LOCKGATE_PROCESS"
LOG_BYTES_MAX = 4 * 1024 * 1024


class Process:
    """A running child, our own or adopted. `exited` is set the moment it ends."""

    def __init__(self, pid: int, started_at: float, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.started_at = started_at
        self.exited = asyncio.Event()
        self._child = child
        self._descriptor = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._ended)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        if self._child is not None:
            self._child.wait()  # it has ended: this reaps it and returns at once
        self.exited.set()

    @property
    def exit_code(self) -> int | None:
        """The exit code of our own child once it has ended; unknown (None) for an adopted one."""
        return self._child.returncode if self._child is not None else None

    def signal(self, number: int) -> None:
        """Sends the signal, to this very process: a reused id cannot be hit."""
        if self._descriptor != -1:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, and after `grace_s` makes it. Returns once it has ended."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.exited.wait(), grace_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.exited.wait()

    def let_go(self) -> None:
        """Stops watching; the process goes on."""
        if self._descriptor != -1:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def mark(home: Path, what: str) -> str:
    """The mark of a child of the agent in `home`."""
    return f"{home}|{what}"


def bound(log: Path) -> None:
    """A log that has grown large is set aside, in place of the one before it."""
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        log.replace(log.with_suffix(".old.log"))


def start(command: Sequence[str], marked: str, log: Path, environment: Mapping[str, str] | None = None) -> Process:
    """Starts the command in a session of its own, its output in `log`. Raises OSError if it cannot be started."""
    bound(log)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {}), MARK: marked},
        )
    return Process(child.pid, time.time(), child)


def survivors(home: Path) -> dict[str, list[Process]]:
    """The children of an agent in `home` that still run, by what they are."""
    found: dict[str, list[Process]] = {}
    prefix = f"{home}|"
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            marked = candidate.environ().get(MARK, "")
            if not marked.startswith(prefix) or candidate.pid == os.getpid():
                continue
            if candidate.status() == psutil.STATUS_ZOMBIE:
                continue
            found.setdefault(marked.removeprefix(prefix), []).append(Process(candidate.pid, candidate.create_time()))
    return found


def listening_on(path: Path) -> int | None:
    """The id of the process that listens on the Unix socket; None if none does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full backlog means that somebody is there, but cannot be asked who
        try:
            probe.connect(str(path))
            pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return None
    return int(pid)


def last_words(log: Path, size: int = 4000) -> str:
    """The last line that a process wrote, for saying why it ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:500] if lines else ""
