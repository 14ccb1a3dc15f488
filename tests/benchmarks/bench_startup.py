"""What it takes until something happens: `python -m tests.benchmarks.bench_startup`.

On a platform of its own, one after the other: a flow that does nothing and our flow `deliver`, each from the moment its
run is asked for to its first line (Prefect's `start_time`, which is after all imports); then an alias set in the
registry, under traffic, to the first answer of the new version, with the parts of the way. And how long modules take to
be imported in a fresh interpreter. Writes `build/benchmarks/startup.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from flows.deployments import POOL, QUEUE
from tests.e2e import toy
from tests.e2e.running_platform import Clients, Platform, running_platform, wait_until
from tests.e2e.test_triggers import ask, settled

BAR_S = 1.0
ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "prefect",
    "flows.deliver",
    "flows.rollback",
    "flows.reconcile",
    "flows.monitor",
    "flows.cli",
    "serving.server",
)
POLICY = toy.POLICY.replace("    - shadow: {share: 1.0, for: 3s}\n", "")


def imports(rounds: int) -> dict[str, float]:
    """By module, the median seconds of a fresh interpreter that imports it, less one that imports nothing."""

    def one(module: str) -> float:
        began = time.perf_counter()
        code = f"import {module}" if module else ""
        env = {**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
        return time.perf_counter() - began

    taken: dict[str, list[float]] = {name: [] for name in ("", *MODULES)}
    for _ in range(rounds):
        for name in taken:  # alternating: what else the machine does meets all of them
            taken[name].append(one(name))
    bare = statistics.median(taken[""])
    return {name: round(statistics.median(taken[name]) - bare, 3) for name in MODULES}


class Server:
    """The platform's Prefect server."""

    def __init__(self, platform: Platform) -> None:
        self.api = f"http://127.0.0.1:{platform.ports['PREFECT']}/api"

    def bare(self) -> str:
        """The deployment of the flow that does nothing, beside ours in the same work pool; its id."""
        os.environ["PREFECT_API_URL"] = self.api  # before Prefect is imported
        from prefect.types.entrypoint import EntrypointType

        from tests.benchmarks.bare_flow import bare

        made = bare.to_deployment(
            "bare",
            work_pool_name=POOL,
            work_queue_name=QUEUE,
            entrypoint_type=EntrypointType.MODULE_PATH,
            job_variables={"env": {"PYTHONPATH": str(ROOT)}},
        )
        return str(made.apply())

    def deployment(self, name: str) -> str:
        return str(httpx.get(f"{self.api}/deployments/name/{name}/{name}").json()["id"])

    def first_line(self, deployment: str, parameters: dict[str, Any]) -> float:
        """Seconds from asking for a run to its flow's first line."""
        url = f"{self.api}/deployments/{deployment}/create_flow_run"
        asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        made = httpx.post(url, json=asked, timeout=30.0)
        while made.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # SQLite is locked: as Prefect's client does
            time.sleep(1.0)
            made = httpx.post(url, json=asked, timeout=30.0)
        run = made.raise_for_status().json()
        seen: dict[str, Any] = {}

        def ended() -> bool:
            seen.update(httpx.get(f"{self.api}/flow_runs/{run['id']}", timeout=30.0).json())
            return seen["state_type"] in ("COMPLETED", "FAILED", "CRASHED")

        wait_until(ended, 180, "the run has ended")
        assert seen["state_type"] != "CRASHED", seen["state"]
        return _posix(seen["start_time"]) - _posix(seen["created"])


def runs(platform: Platform, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first line, by flow: bare and ours, alternating. Ours is asked for a model that nobody knows."""
    server = Server(platform)
    bare, ours = server.bare(), server.deployment("deliver")
    policy = "policy: p\nrollout: {stages: [canary: {weight: 10, for: 5s}]}\n"
    nobody = {"model": "nobody", "version": 1, "policy": policy}
    found: dict[str, list[float]] = {"bare": [], "deliver": []}
    for number in range(rounds + 1):
        pair = {"bare": server.first_line(bare, {}), "deliver": server.first_line(ours, nobody)}
        if number:  # the first of each is not counted: files come from the disk
            for name, seconds in pair.items():
                found[name].append(round(seconds, 2))
        print(f"{number or 'warm-up'}: {pair['bare']:.2f} s bare, {pair['deliver']:.2f} s deliver", flush=True)
    return found


def way(platform: Platform) -> dict[str, float]:
    """Seconds from the alias to each step on the way to the new version's first live answer."""
    client, version = ask(platform, platform.files / "v1")
    settled(client, version)
    with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST) as traffic:
        client, version = ask(platform, toy.make(platform.files / "v2", seed=2))
        began = time.time()  # `ask` returns when the alias is set

        def answered() -> list[float]:
            wall = time.time() - time.monotonic()
            return [each.at + wall for each in list(traffic.answers) if each.version == version]

        wait_until(lambda: bool(answered()), 180, "the new version answers")
        first = answered()[0]
        settled(client, version)
    url = f"{Server(platform).api}/flow_runs/filter"
    found = httpx.post(url, json={"sort": "ID_DESC", "flow_runs": {"tags": {"all_": ["lockgate"]}}}).json()
    run = next(each for each in found if each["parameters"].get("version") == int(version))
    book = platform.ledger()
    try:
        entries = book.read(book.rollouts("toy")[0])
    finally:
        book.close()
    at = {}
    for entry in entries:
        at.setdefault(entry.kind, entry.at)
    times = {
        "flow run asked for": _posix(run["created"]),
        "deliver's first line": _posix(run["start_time"]),
        "registered, on the ledger": at["requested"],
        "checked and benchmarked": at["checked"],
        "first live answer": first,
    }
    return {what: round(when - began, 2) for what, when in times.items()}


def _posix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def report(imported: dict[str, float], firsts: dict[str, list[float]], steps: dict[str, float]) -> dict[str, Any]:
    """The tables, the check and the raw figures."""
    print("\nimport, fresh interpreter             s")
    for name, seconds in imported.items():
        print(f"  {name:<32} {seconds:6.2f}")
    print("alias set -> ...                      s")
    for what, seconds in steps.items():
        print(f"  {what:<32} {seconds:6.2f}")
    bare, ours = statistics.median(firsts["bare"]), statistics.median(firsts["deliver"])
    added = ours - bare
    print(f"first line of a flow run: bare {bare:.2f} s, deliver {ours:.2f} s")
    told = "holds" if added <= BAR_S else "FAILS"
    print(f"{told}  added to a bare flow run's first line, s: {added:.2f} (<= {BAR_S:g})")
    check = {
        "what": "added to a bare flow run's first line, median, s",
        "value": round(added, 3),
        "bar": f"<= {BAR_S:g}",
        "holds": added <= BAR_S,
    }
    about = {"cpus": os.cpu_count(), "system": machine.platform(), "python": machine.python_version()}
    raw = {"imports_s": imported, "first_line_s": firsts, "alias_to_answer_s": steps}
    return {"checks": [check], "machine": {**about, "load": os.getloadavg()}, "raw": raw}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/startup.json"))
    given = parser.parse_args()
    imported = imports(given.rounds)
    with tempfile.TemporaryDirectory(prefix="lockgate-bench-") as folder:
        files, home = Path(folder) / "files", Path(folder) / "home"
        rows = toy.make(files / "v1", seed=1) / "validation.csv"
        (home / "policies").mkdir(parents=True)
        (home / "policies" / "toy.yaml").write_text(f"model: toy\nvalidate: {{rows: {rows}}}\n" + POLICY)
        with running_platform(home, files) as platform:
            firsts, steps = runs(platform, given.rounds), way(platform)
    result = report(imported, firsts, steps)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(one["holds"] for one in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
