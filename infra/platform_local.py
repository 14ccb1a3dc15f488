"""The local platform: Prefect server, MLflow server and node agent as child processes, under one folder.

PortError               a part could not be started; the message says which, why and where its log is
└── PortBusy                somebody else listens there already
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from subprocess import SubprocessError

import httpx
import psutil

from infra.agent_client import AgentClient, AgentError
from infra.databases_postgresql import create, databases, shown
from infra.part_local import Part
from tasks.ports import BadInput, PortError

_READY_S = 120.0
_STEADY_S = 20.0  # a part that has run for so long starts again at once when it dies


class PortBusy(BadInput):
    """Somebody else listens on the port."""

    def __init__(self, part: str, port: int, option: str) -> None:
        super().__init__(f"port {port} for {part} is in use; free it, or choose another with {option}")


@dataclass(frozen=True)
class Addresses:
    """Where the parts of a platform are; written to `platform.json` once all are ready."""

    home: str
    prefect_port: int
    mlflow_port: int
    gateway_port: int
    trigger_port: int
    pid: int = 0
    started: float = 0.0
    ready: bool = False
    evidently_port: int | None = None
    ledger: str = ""  # its URL, without a password

    @property
    def evidently(self) -> str | None:
        return f"http://127.0.0.1:{self.evidently_port}" if self.evidently_port else None

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    @property
    def hints(self) -> str:
        return f"http://127.0.0.1:{self.trigger_port}/hints"

    @property
    def agent_home(self) -> Path:
        return Path(self.home) / "agent"


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def running(home: Path) -> Addresses | None:
    """The platform that runs in the folder, if one does: its supervisor is alive and is the one that wrote the file."""
    file = home / "platform.json"
    try:
        addresses = Addresses(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as exc:
        raise PortError(f"{file} cannot be read: {exc}; stop what runs there and delete the file") from exc
    except OSError as exc:
        raise PortError(f"{file} cannot be read: {exc.strerror or exc}") from exc
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(addresses.pid).create_time() - addresses.started) < 1.0:
            return addresses
    return None


def lock(home: Path) -> int:
    """Makes this process the only one with a platform in the folder, until the descriptor is closed or it ends.

    Children do not inherit it. Raises PortError where there is one, also if that is still starting.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(home / "platform.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise PortError(
            f"the folder {home} cannot be used: {exc.strerror or exc}; set LOCKGATE_HOME to another"
        ) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        pid = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise PortError(
            f"a platform runs in {home} already, or is on its way up or down (process {pid}); see: lockgate status"
        ) from exc
    except OSError as exc:
        os.close(descriptor)
        raise PortError(
            f"the folder {home} cannot be locked: {exc.strerror or exc}; set LOCKGATE_HOME to one on a local disk"
        ) from exc
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, and does not tell whose it is
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def secret(home: Path, name: str) -> str:
    """The platform's secret of that name (32 random bytes in base64), made when it is first asked for."""
    file = home / "secrets" / name
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not file.exists():
        made = file.with_suffix(f".{os.getpid()}")
        made.touch(mode=0o600)
        made.write_text(base64.urlsafe_b64encode(os.urandom(32)).decode())
        with contextlib.suppress(FileExistsError):
            os.link(made, file)  # the first one stays, whoever made it
        made.unlink()
    return file.read_text()


def announce(home: Path, module: str) -> None:
    """This process, which runs the module beside the platform, is ready."""
    (home / "logs" / f"{module}.pid").write_text(str(os.getpid()))


def announced(home: Path, module: str) -> int | None:
    """The process that last said that it is ready with the module."""
    try:
        return int((home / "logs" / f"{module}.pid").read_text())
    except (FileNotFoundError, ValueError):  # the latter: it is writing
        return None


@dataclass(frozen=True)
class Beside:
    """A Python module that uses the platform and lives with it; `announces`: it says itself when it is ready."""

    name: str
    module: str
    announces: bool = False
    children_outlive: bool = False


@dataclass
class LocalPlatform:
    """Starts, supervises and stops the parts. Use as a context manager, or `start` and `stop`."""

    home: Path
    prefect_port: int = 4200
    mlflow_port: int = 5000
    gateway_port: int = 8080
    evidently_port: int | None = None  # without one, its UI does not run
    trigger_port: int | None = None
    database: str | None = None  # URL of a PostgreSQL server; SQLite files in `home` without one
    ledger: str | None = None  # URL of a ledger elsewhere
    beside: tuple[Beside, ...] = ()
    env: dict[str, str] = field(default_factory=dict)  # what the processes beside it are to know
    parts: list[Part] = field(default_factory=list)
    _lock: int | None = None

    def start(self, progress: Callable[[str], None] = lambda _text: None) -> Addresses:
        """All parts are ready when this returns. Raises PortError; whatever had started is stopped again."""
        held = lock(self.home)
        try:
            already = running(self.home)
            if already is not None:  # by a version that takes no lock
                raise PortError(f"a platform runs in {self.home} already (process {already.pid}); see: lockgate status")
        except PortError:
            os.close(held)
            raise
        self._lock = held
        try:
            self._check_ports()
            (self.home / "logs").mkdir(exist_ok=True)
            self.home.chmod(0o700)
            if self.database:
                for name in create(self.database):
                    progress(f"database {name} was made")
            self.parts = [self._prefect(), self._mlflow(), self._agent()]
            if self.evidently_port is not None:
                self.parts.append(self._evidently(self.evidently_port))
            for part in self.parts:
                part.start()
            for part in self.parts:
                self._await(part)
                progress(f"{part.name} is ready")
            addresses = self.addresses()
            self._write(addresses)
            companions = [self._beside(each) for each in self.beside]
            for part in companions:
                part.start()
                self.parts.append(part)
            for part in companions:
                self._await(part)
                progress(f"{part.name} is ready")
            self._write(replace(addresses, ready=True))
        except BaseException:
            self.stop()
            raise
        return addresses

    def _write(self, addresses: Addresses) -> None:
        partial = self.home / "platform.json.part"
        partial.write_text(json.dumps(asdict(addresses)))
        partial.rename(self.home / "platform.json")

    def addresses(self) -> Addresses:
        me = psutil.Process()
        self.trigger_port = self.trigger_port or free_port()
        ports = (self.prefect_port, self.mlflow_port, self.gateway_port, self.trigger_port)
        started = me.create_time()
        ledger = shown(self.ledger or databases(self.home, self.database).ledger)
        return Addresses(
            str(self.home), *ports, pid=me.pid, started=started, evidently_port=self.evidently_port, ledger=ledger
        )

    def supervise(self) -> Iterator[str]:
        """Once a call: restarts parts that died (with back-off), and yields a line for each."""
        for part in self.parts:
            if part.process is None or part.code() is None:
                continue
            now = time.monotonic()
            if part.restart_at == 0.0:
                if now - part.started_at > _STEADY_S:
                    part.restarts = 0
                part.restart_at = now + part.delay_s
                code = part.process.returncode
                yield f"{part.name} ended with code {code} ({part.last_words()}); again in {part.delay_s:.1f} s"
            elif now >= part.restart_at:
                part.restarts += 1
                try:
                    part.start()
                except (OSError, SubprocessError) as exc:  # no process, memory or descriptor is left: the others go on
                    part.restart_at = now + part.delay_s
                    yield f"{part.name} could not be started again: {exc}; again in {part.delay_s:.1f} s"
                else:
                    part.restart_at = 0.0
                    yield f"{part.name} was started again"

    def stop(self) -> None:
        """Nothing is left running; the data stays."""
        for part in reversed(self.parts):
            part.stop()
        if self._lock is not None:  # without it, the file is another process's
            (self.home / "platform.json").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _check_ports(self) -> None:
        for part, port, option in (
            ("Prefect", self.prefect_port, "--prefect-port"),
            ("MLflow", self.mlflow_port, "--mlflow-port"),
            ("the gateway", self.gateway_port, "--gateway-port"),
            ("Evidently", self.evidently_port, "--evidently-port"),
            ("the trigger receiver", self.trigger_port, "--trigger-port"),
        ):
            if port is not None and not is_free(port):
                raise PortBusy(part, port, option)

    def _await(self, part: Part) -> None:
        limit = time.monotonic() + _READY_S
        while time.monotonic() < limit:
            if part.code() is not None:
                raise PortError(f"{part.name} did not start: {part.last_words()} (log: {part.log})")
            if part.ready():
                return
            time.sleep(0.1)
        raise PortError(f"{part.name} was not ready after {_READY_S:.0f} s (log: {part.log})")

    def _beside(self, wanted: Beside) -> Part:
        part = self._part(wanted.name, ["-m", wanted.module], lambda: True, self.env)
        part.children_outlive = wanted.children_outlive
        if wanted.announces:
            part.ready = lambda: part.process is not None and announced(self.home, wanted.module) == part.process.pid
        return part

    def _part(self, name: str, command: list[str], ready: Callable[[], bool], env: dict[str, str]) -> Part:
        return Part(name, [sys.executable, *command], env, self.home / "logs" / f"{name.lower()}.log", ready)

    def _prefect(self) -> Part:
        env = {
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{self.prefect_port}/api",
            "PREFECT_API_DATABASE_CONNECTION_URL": databases(self.home, self.database).prefect,
        }
        module = "prefect"
        if self.database is None:
            module = "infra.server_prefect"
            # Each waiting run would be marked as late in a transaction of its own, all of them at once. On SQLite all
            # but one fail, and are tried again 5 s later: with a hundred, hundreds fail in a minute.
            env["PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED"] = "false"
        return self._part(
            "Prefect",
            ["-m", module, "server", "start", "--host", "127.0.0.1", "--port", str(self.prefect_port)],
            _answers(f"http://127.0.0.1:{self.prefect_port}/api/health"),
            env,
        )

    def _mlflow(self) -> Part:
        artifacts = ["--serve-artifacts", f"--artifacts-destination={self.home / 'artifacts'}", "--workers=1"]
        return self._part(
            "MLflow",
            ["-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.mlflow_port}", *artifacts],
            _answers(f"http://127.0.0.1:{self.mlflow_port}/health"),
            {
                # Not as an argument: those can be read by everybody on the machine.
                "MLFLOW_BACKEND_STORE_URI": databases(self.home, self.database).mlflow,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                # Hints go to the receiver on this machine, over HTTP; one that is new is in force at once.
                "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
                "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
                "MLFLOW_WEBHOOK_CACHE_TTL": "1",
                "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": secret(self.home, "webhooks"),
            },
        )

    def _evidently(self, port: int) -> Part:
        return self._part(
            "Evidently",
            [
                "-c",
                "from evidently.cli import app; app()",
                "ui",
                "--workspace",
                str(self.home / "evidently"),
                "--port",
                str(port),
            ],
            _answers(f"http://127.0.0.1:{port}/api/version"),
            {},
        )

    def _agent(self) -> Part:
        home = self.home / "agent"
        part = self._part(
            "Agent",
            ["-m", "serving.agent", "--home", str(home), "--gateway-port", str(self.gateway_port)],
            lambda: _agent_ready(home),
            {},
        )
        part.children_outlive = True  # its gateway and servers go on, and are found again
        part.away_max_s = 1.0  # leases are kept by nobody else: a canary stays in the traffic while it is away
        return part


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            return httpx.get(url, timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    return ready


def _agent_ready(home: Path) -> bool:
    try:
        return bool(AgentClient(home).status()["gateway"]["ready"])
    except AgentError:
        return False
