"""A model server as a real process, for the tests that need one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


@dataclass
class RunningServer:
    """`client` speaks to it; `stop` ends it with SIGTERM and returns (exit code, stderr)."""

    process: subprocess.Popen[str]
    url: str
    client: httpx.Client

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err

    def metric(self, name: str, **labels: str) -> float:
        """The value of the one series with this name and (at least) these labels."""
        for line in self.client.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(f'{key}="{text}"' in series for key, text in labels.items()):
                return float(value)
        raise AssertionError(f"no series {name} {labels}")


@contextlib.contextmanager
def running(path: Path, *arguments: str, model: str = "m", version: str = "1") -> Iterator[RunningServer]:
    """A server for the model at `path` on a free port."""
    command = [sys.executable, "-m", "serving.server", "--model", model, "--version", version]
    command += ["--path", str(path), "--port", "0", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if " at " not in line:
        raise AssertionError(f"the server did not start: {process.communicate(timeout=10)[1]}")
    url = line.split(" at ")[1].split()[0]
    with httpx.Client(base_url=url, timeout=30) as client:
        server = RunningServer(process, url, client)
        try:
            yield server
        finally:
            if process.poll() is None:
                server.stop()


def wait_for(condition: object, seconds: float = 10.0) -> None:
    """Waits until `condition()` is true; fails after `seconds`."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
