"""A node agent with a real Envoy and stand-in model servers, for tests: started, killed, stopped, and asked."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.agent_client import AgentClient, AgentError
from policies.traffic import Route

STAND_IN = Path(__file__).with_name("stand_in.py")
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Waits for the condition, bounded; fails naming it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = holds()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def version(self) -> str:
        return self.headers.get("x-lockgate-version", "")


class RunningAgent:
    """One agent's home, its process, and a client of its gateway."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, server: str | None = None) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.port = port or free_port()
        self.options = options
        self.server = server or f"{sys.executable} {STAND_IN}"
        self.client = AgentClient(self.home)
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "serving.agent", "--home", str(self.home), "--gateway-port", str(self.port)]
        return [*command, "--server-command", self.server, *self.options]

    def start(self, room: int | None = None) -> RunningAgent:
        """In service when it returns. `room`: no file may have more bytes by it, as on a disk that is (nearly) full."""
        command = self.command() if room is None else ["prlimit", f"--fsize={room}:", *self.command()]
        log = (self.folder / "agent.log").open("a")
        with log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=ROOT)
        until(self._answers, "the agent answers")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "agent.log").read_text()
        try:
            return bool(self.client.status()["gateway"]["ready"])
        except AgentError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """A clean stop; children that a killed agent left behind are ended, too."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        for pid in self.children():
            os.kill(pid, signal.SIGKILL)

    def children(self) -> list[int]:
        """The process ids that carry this home's mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    marked = f"LOCKGATE_PROCESS={self.home.resolve()}|".encode() in (entry / "environ").read_bytes()
                except OSError:
                    continue
                if marked and not gone(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def model(self, **behaviour: Any) -> tuple[Path, str]:
        """A model file for the stand-in, and its digest."""
        data = json.dumps({"mode": "ok", **behaviour, "salt": str(time.time_ns())}).encode()
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / f"{digest[:8]}.onnx"
        path.write_bytes(data)
        return path, digest

    def deploy(self, version: str, model: str = "m", replicas: int = 1, **behaviour: Any) -> str:
        """Deployed and ready; returns the digest."""
        path, digest = self.model(**behaviour)
        self.client.deploy(model, version, path, digest, replicas=replicas)
        until(lambda: self.version(version, model)["state"] == "ready", f"version {version} is ready")
        return digest

    def version(self, version: str, model: str = "m") -> dict[str, Any]:
        return dict(self.client.status()["models"][model]["versions"][version])

    def kill_server(self, version: str, model: str = "m") -> int:
        """SIGKILL to the version's first replica; returns once another one is ready in its place."""
        pid = int(self.version(version, model)["replicas"][0]["pid"])
        os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            replica = self.version(version, model)["replicas"][0]
            return bool(replica["ready"] and replica["pid"] != pid)

        until(replaced, f"version {version} is back")
        return pid

    def route(self, stable: str | None, candidate: str | None = None, **fields: Any) -> None:
        model = fields.pop("model", "m")
        self.client.set_route(Route(model, stable, candidate, **fields))

    def ask(self, path: str = "/v2/models/m/infer", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            return ask_on(connection, path, headers)
        finally:
            connection.close()

    def ask_many(self, number: int, path: str = "/v2/models/m/infer", keys: bool = False) -> Counter[tuple[int, str]]:
        """How often which status came from which version, over one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        seen: Counter[tuple[int, str]] = Counter()
        for index in range(number):
            answer = ask_on(connection, path, {"x-lockgate-key": f"user-{index}"} if keys else {})
            seen[answer.status, answer.version] += 1
        connection.close()
        return seen

    def ask_as(self, users: Iterable[str], path: str = "/v2/models/m/infer") -> Iterator[tuple[str, str]]:
        """Which version answers each user."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        for user in users:
            answer = ask_on(connection, path, {"x-lockgate-key": user})
            assert answer.status == 200, answer
            yield user, answer.version
        connection.close()


def ask_on(connection: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, body=b'{"inputs": []}', headers=sent)
    answer = connection.getresponse()
    body = answer.read()
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = {"text": body.decode()}
    return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, parsed)
