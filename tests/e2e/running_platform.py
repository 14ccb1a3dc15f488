"""A local platform of the tests' own, used as a user does, and clients that count what they are answered."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from infra.databases_postgresql import databases
from infra.ledger_sql import SqlLedger

ABORTED = "FATAL: "  # how glibc begins the last words of a process that it ends


@dataclass
class Run:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Platform:
    """Where it is, and its command line."""

    home: Path
    ports: dict[str, int]
    files: Path
    env: dict[str, str] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process that uses the platform."""
        return {**os.environ, **self.env, **more}

    def lockgate(self, *arguments: object, **env: str) -> Run:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=self.environment(**env),
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    def deliver(self, folder: Path, *more: object, policy: Path | None = None, **env: str) -> Run:
        files = ("--file", folder / "model.onnx", "--validation", folder / "validation.csv")
        policy = policy or self.files / "toy.yaml"
        return self.lockgate("deliver", "toy", *files, "--policy", policy, "--json", *more, **env)

    def versions(self) -> int:
        """How many versions the registry has."""
        url = f"http://127.0.0.1:{self.ports['MLFLOW']}/api/2.0/mlflow/model-versions/search"
        return len(httpx.get(url, params={"filter": "name='toy'"}).json().get("model_versions", []))

    def said(self, words: str) -> dict[str, int]:
        """By log, how often it has the words."""
        logs = (self.home / "logs").glob("*.log")
        counted = {log.name: log.read_text(errors="replace").count(words) for log in logs}
        return {name: count for name, count in counted.items() if count}

    def ledger(self) -> SqlLedger:
        """The platform's ledger; to be closed."""
        url = databases(self.home, self.env.get("LOCKGATE_DATABASE")).ledger
        return SqlLedger(self.env.get("LOCKGATE_LEDGER_URL") or url)


@contextmanager
def running_platform(home: Path, files: Path, **env: str) -> Iterator[Platform]:
    """Started by `lockgate up`; nothing of it is left afterwards."""
    ports = {name: free_port() for name in ("PREFECT", "MLFLOW", "GATEWAY")}
    addresses = {f"LOCKGATE_{name}_PORT": str(port) for name, port in ports.items()}
    made = Platform(home, ports, files, {**addresses, "LOCKGATE_HOME": str(home), **env})
    up = made.lockgate("up", "--detach")
    assert up.code == 0, up.err + up.out
    try:
        yield made
    finally:
        down = made.lockgate("down")
    assert down.code == 0, down.err + down.out
    left = [line for line in processes() if str(home) in line]
    assert not left, "nothing may be left behind"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes() -> list[str]:
    """The command lines of all processes."""
    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(holds: Callable[[], bool], seconds: float, what: str = "", every_s: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every_s)


@dataclass(frozen=True)
class Answer:
    """What a client got: the version that answered, or why it was no answer. Times on the monotonic clock."""

    asked: float
    at: float
    version: str
    failure: str = ""


class Clients:
    """Steady requests for one model over kept connections, in threads, until the block ends."""

    def __init__(self, port: int, model: str, *requests: Any, threads: int = 3, pause_s: float = 0.02) -> None:
        self.answers: list[Answer] = []
        self._port, self._path, self._pause_s = port, f"/v2/models/{model}/infer", pause_s
        self._bodies = [json.dumps({"inputs": [request]}) for request in requests]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(15)

    def failed(self, since: float = 0.0) -> list[Answer]:
        return [answer for answer in list(self.answers) if answer.failure and answer.at >= since]

    def served(self, since: float = 0.0) -> set[str]:
        """The versions that answered requests sent since then."""
        return {answer.version for answer in list(self.answers) if not answer.failure and answer.asked >= since}

    def _work(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        for body in itertools.cycle(self._bodies):
            if self._stop.is_set():
                break
            asked = time.monotonic()
            try:
                connection.request("POST", self._path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                said = answer.read()
                version = answer.headers.get("x-lockgate-version", "")
                failure = "" if answer.status == 200 else f"{answer.status}: {said[:200].decode(errors='replace')}"
            except (OSError, http.client.HTTPException) as exc:
                version, failure = "", repr(exc)
                connection.close()
            self.answers.append(Answer(asked, time.monotonic(), version, failure))
            time.sleep(self._pause_s)
        connection.close()
