"""A process of the local platform: how it is started, and ended with all that it had started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_STOP_S = 15.0

SILENCE = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # not of ours any more
        return False
    return True


def _die_with_parent() -> None:
    """Linux sends the child SIGTERM when its parent dies, however that happens (prctl(2), PR_SET_PDEATHSIG = 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass
class Part:
    """One process of ours: how it is started, how it is known to be ready, where it writes."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    ready: Callable[[], bool] = lambda: True
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    restart_at: float = 0.0
    away_max_s: float = 30.0  # before it is started again, however often it has died
    children_outlive: bool = False  # what it had started goes on while it is started again
    started_at: float = 0.0
    _former: list[int] = field(default_factory=list)

    def start(self) -> None:
        if self.process is not None:
            # A group that has ended is forgotten: its number may come to be somebody else's.
            self._former = [group for group in (*self._former, self.process.pid) if _has_members(group)]
            if not self.children_outlive:
                self._end_groups()
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **SILENCE, **self.env},
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self.started_at = time.monotonic()

    @property
    def delay_s(self) -> float:
        """How long it waits before it is started again: longer each time."""
        return min(2.0 ** min(self.restarts, 10) * 0.2, self.away_max_s)

    def stop(self) -> None:
        """Asks, waits, then insists; the part's own children go with it."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._former.append(process.pid)
        self._end_groups()

    def _end_groups(self) -> None:
        """What it and its predecessors left running is ended."""
        for group in self._former:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self._former.clear()

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return None if self.process is None else self.process.poll()

    def lines(self) -> list[str]:
        """What it has written so far, whole lines only."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def last_words(self) -> str:
        try:
            return next((line for line in reversed(self.lines()) if line.strip()), "it said nothing")
        except OSError as exc:
            return f"its log cannot be read: {exc.strerror or exc}"
