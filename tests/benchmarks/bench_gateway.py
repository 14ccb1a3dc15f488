"""What the gateway costs, and how fast a change of weights is in force: `python -m tests.benchmarks.bench_gateway`.

Cost: the same model server asked directly, through our Envoy configuration (aggregate clusters, retries, buffering,
hash split), through a plain Envoy and through HAProxy; in turns within each round. p50 at one connection, CPU of the
proxy's process per request at 16. Needs `wrk` and `haproxy` (Debian packages of these names).

Changes: clients ask without pause while the route changes 100 times (shares, promotions, rollbacks). A change is in
force from the moment after which no request that starts still gets the former version, counted from the call to the
agent; measured at the clients.

Where it is allowed (root), agent, gateway and servers run before clients and all else, as on a machine of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from serving.envoy import binary
from tests.serving import models
from tests.serving.running_agent import RunningAgent, free_port, until

PATH = "/v2/models/m/infer"
BODY = '{"inputs": [{"name": "f", "shape": [1, 4], "datatype": "FP32", "data": [0.1, 0.2, 0.3, 0.4]}]}'
CLIENTS = 16


# --- cost -----------------------------------------------------------------------------------------------------------


def wrk(port: int, connections: int, seconds: float, script: Path) -> dict[str, float]:
    """p50 in milliseconds, requests, and those that failed."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script)]
    done = subprocess.run([*command, f"http://127.0.0.1:{port}{PATH}"], capture_output=True, text=True, check=True)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)", done.stdout)
    total = re.search(r"(\d+) requests in", done.stdout)
    assert p50 is not None, done.stdout
    assert total is not None, done.stdout
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}[p50[2]]
    return {"p50_ms": float(p50[1]) * scale, "requests": float(total[1]), "failed": float(failed[1]) if failed else 0.0}


def cpu_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """The process, once it listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: any(one.laddr.port == port for one in psutil.Process(process.pid).net_connections()), command[0])
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def plain_envoy(folder: Path, port: int, socket: str) -> list[str]:
    kind = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{kind}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "plain",
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "one"}}]}
            ]
        },
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{kind}.http.router.v3.Router"}}],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    endpoint = {"endpoint": {"address": {"pipe": {"path": socket}}}}
    cluster = {"name": "one", "load_assignment": {"cluster_name": "one", "endpoints": [{"lb_endpoints": [endpoint]}]}}
    path = folder / "plain.json"
    path.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))
    return [str(binary()), "-c", str(path), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]


def haproxy(folder: Path, port: int, socket: str) -> list[str]:
    path = folder / "haproxy.cfg"
    path.write_text(
        "global\n nbthread 1\ndefaults\n mode http\n timeout connect 1s\n timeout client 30s\n timeout server 30s\n"
        f"frontend f\n bind 127.0.0.1:{port}\n default_backend b\nbackend b\n server s unix@{socket}\n"
    )
    return ["haproxy", "-f", str(path), "-db"]


def cost(agent: RunningAgent, model: Path, digest: str, rounds: int, seconds: float) -> dict[str, Any]:
    """p50 added and CPU per request, by way."""
    script = agent.folder / "post.lua"
    script.write_text(f"wrk.method='POST'\nwrk.body='{BODY}'\nwrk.headers['content-type']='application/json'\n")
    socket = agent.version("1")["replicas"][0]["endpoint"].removeprefix("unix:")
    agent.route("1", "2", weight=50, epoch=1)
    ways: dict[str, tuple[int, int | None]] = {"gateway": (agent.port, agent.client.status()["gateway"]["pid"])}
    with ExitStack() as stack:
        port = free_port()
        server = [sys.executable, "-m", "serving.server", "--model", "m", "--version", "1", "--path", str(model)]
        stack.enter_context(running([*server, "--digest", digest, "--port", str(port)], port))
        ways["direct"] = (port, None)
        port = free_port()
        ways["plain Envoy"] = (port, stack.enter_context(running(plain_envoy(agent.folder, port, socket), port)))
        port = free_port()
        ways["HAProxy"] = (port, stack.enter_context(running(haproxy(agent.folder, port, socket), port)))
        seen: dict[str, dict[str, list[float]]] = {way: {"p50_ms": [], "cpu_us": [], "rps": []} for way in ways}
        failed = 0.0
        for _ in range(rounds):
            for way, (port, pid) in ways.items():
                alone = wrk(port, 1, seconds, script)
                before = cpu_s(pid)
                many = wrk(port, CLIENTS, seconds, script)
                seen[way]["p50_ms"].append(alone["p50_ms"])
                seen[way]["cpu_us"].append(1e6 * (cpu_s(pid) - before) / many["requests"])
                seen[way]["rps"].append(many["requests"] / seconds)
                failed += alone["failed"] + many["failed"]
    return {"failed": failed, "by_way": seen}


# --- changes --------------------------------------------------------------------------------------------------------


class _Client(asyncio.Protocol):
    """Asks again as soon as it is answered; notes when each request started and who answered it."""

    def __init__(self, notes: list[tuple[float, str]]) -> None:
        self.notes = notes
        self.stopped = False
        self._data = b""
        self._request = (
            f"POST {PATH} HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"
            f"content-length: {len(BODY)}\r\n\r\n{BODY}"
        ).encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._ask()

    def _ask(self) -> None:
        self._started = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head) if found else None
        if length is None or len(rest) < int(length[1]):
            return
        version = re.search(rb"x-lockgate-version: (\S+)", head)
        good = head.startswith(b"HTTP/1.1 200") and version is not None
        self.notes.append((self._started, version[1].decode() if good and version else head[:60].decode()))
        self._data = b""
        if not self.stopped:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.stopped:
            self.notes.append((self._started, f"connection lost: {exc}"))


def _clients(port: int, talk: Connection) -> None:
    """In a process of its own: runs until told, then sends what was noted."""

    async def ask_until_told() -> list[tuple[float, str]]:
        loop = asyncio.get_running_loop()
        notes: list[tuple[float, str]] = []
        made = [await loop.create_connection(lambda: _Client(notes), "127.0.0.1", port) for _ in range(CLIENTS)]
        await loop.run_in_executor(None, talk.recv)
        for _, client in made:
            client.stopped = True
        await asyncio.sleep(0.5)
        for transport, _ in made:
            transport.close()
        return notes

    talk.send(asyncio.run(ask_until_told()))


def changes(agent: RunningAgent, number: int, pause_s: float) -> dict[str, Any]:
    """All traffic to and fro between the versions, over shares of half: `number` changes under load."""
    steps: list[tuple[str, str | None, int, set[str]]] = [
        ("1", "2", 50, {"1", "2"}),
        ("2", None, 0, {"2"}),  # promotion
        ("2", "1", 50, {"1", "2"}),
        ("1", None, 0, {"1"}),  # rollback
    ]
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_clients, args=(agent.port, theirs))
    epoch = agent.client.status()["models"]["m"]["route"]["epoch"]
    process.start()
    time.sleep(2.0)
    calls: list[tuple[float, float, set[str]]] = []
    for index in range(number):
        stable, candidate, weight, allowed = steps[index % len(steps)]
        epoch += 1
        began = time.monotonic()
        agent.route(stable, candidate, weight=weight, epoch=epoch)
        calls.append((began, time.monotonic(), allowed))
        time.sleep(pause_s)
    ours.send("stop")
    notes: list[tuple[float, str]] = sorted(ours.recv())
    process.join(20)
    return {
        "requests": len(notes),
        "failed": [said for _, said in notes if said not in ("1", "2")],
        "call_ms": [1000 * (ended - began) for began, ended, _ in calls],
        "in_force_ms": [_in_force_ms(calls, index, notes) for index in range(len(calls)) if len(calls[index][2]) == 1],
    }


def _in_force_ms(calls: list[tuple[float, float, set[str]]], index: int, notes: list[tuple[float, str]]) -> float:
    """From the call to the start of the last request, before the next call, that still got a version it should not."""
    began, _, allowed = calls[index]
    until_then = calls[index + 1][0] if index + 1 < len(calls) else began + 0.1
    late = [at - began for at, version in notes if began <= at < until_then and version not in allowed]
    return 1000 * max(late, default=0.0)


# --- table and file -------------------------------------------------------------------------------------------------


def check(what: str, value: float, bar: str, holds: Callable[[float], bool]) -> dict[str, Any]:
    return {"what": what, "value": round(value, 4), "bar": bar, "holds": holds(value)}


def report(costs: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    by_way = {
        way: {name: statistics.median(values) for name, values in seen.items()} for way, seen in costs["by_way"].items()
    }
    direct = by_way["direct"]["p50_ms"]
    print(f"{'way':14} {'p50 ms':>8} {'added ms':>9} {'CPU us/request':>15} {'requests/s':>11}")
    for way, seen in by_way.items():
        added = seen["p50_ms"] - direct
        print(f"{way:14} {seen['p50_ms']:8.3f} {added:9.3f} {seen['cpu_us']:15.1f} {seen['rps']:11.0f}")
    in_force, calls = sorted(changed["in_force_ms"]), sorted(changed["call_ms"])
    ours, plain, other = by_way["gateway"], by_way["plain Envoy"], by_way["HAProxy"]
    checks = [
        check("requests through changes", changed["requests"], ">= 100000", lambda value: value >= 100_000),
        check("failed requests through changes", len(changed["failed"]), "== 0", lambda value: value == 0),
        check("in force at clients, p50, ms", statistics.median(in_force), "<= 10", lambda value: value <= 10),
        check("in force at clients, max, ms", in_force[-1], "<= 10", lambda value: value <= 10),
        check("call to the agent, p50, ms", statistics.median(calls), "reported", lambda _: True),
        check("call to the agent, max, ms", calls[-1], "reported", lambda _: True),
        check("added p50, ms", ours["p50_ms"] - direct, "reported", lambda _: True),
        check("added p50 against plain Envoy, ms", ours["p50_ms"] - plain["p50_ms"], "reported", lambda _: True),
        check("CPU per request against plain Envoy", ours["cpu_us"] / plain["cpu_us"], "reported", lambda _: True),
        check("added p50 against HAProxy, ms", ours["p50_ms"] - other["p50_ms"], "reported", lambda _: True),
        check("CPU per request against HAProxy", ours["cpu_us"] / other["cpu_us"], "reported", lambda _: True),
        check("failed requests through proxies", costs["failed"], "== 0", lambda value: value == 0),
    ]
    for one in checks:
        print(f"{'ok  ' if one['holds'] else 'MISS'} {one['what']:40} {one['value']:>12} {one['bar']:>12}")
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
    raw = {"cost": costs, "changes": {**changed, "failed": changed["failed"][:20]}}
    return {"checks": checks, "machine": machine, "raw": raw}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--pause-s", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/gateway.json"))
    given = parser.parse_args()
    missing = [tool for tool in ("wrk", "haproxy") if shutil.which(tool) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        agent = RunningAgent(Path(folder), server=f"{sys.executable} -m serving.server")
        try:
            if os.geteuid() == 0:
                os.setpriority(os.PRIO_PROCESS, 0, -20)  # inherited by what the agent starts
            agent.start()
            os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
            for version in ("1", "2"):
                path = agent.folder / f"{version}.onnx"
                digest = models.score(path)
                agent.client.deploy("m", version, path, digest, sample_share=0.0)
                until(lambda version=version: agent.version(version)["state"] == "ready", "it is ready")  # type: ignore[misc]
            costs = cost(agent, path, digest, given.rounds, given.seconds)
            agent.route("1", epoch=2)
            changed = changes(agent, given.changes, given.pause_s)
        finally:
            agent.stop()
    result = report(costs, changed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1))
    return 0 if all(one["holds"] for one in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
