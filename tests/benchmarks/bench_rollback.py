"""How long clients still reach a bad version after a gate has seen it: `python -m tests.benchmarks.bench_rollback`.

On a platform of its own, under live load, versions that fail on half of their rows are delivered again and again (by
default 54 times, on three models side by side). Each is taken back by the `errors` gate in its canary. Measured is the
time from the beginning of the look that failed to the last answer that any client got from that version; also from the
entry of that look in the ledger, and to the end of the rollout. Writes `build/benchmarks/rollback.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform as machine
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from policies.events import Phase
from tests.e2e.deaths import Cell, Lane, in_lanes, write_rows
from tests.e2e.running_platform import Platform, running_platform

BAR_S = 2.0
ROLLED_BACK = Cell("", "rolled back", "")


def rollback(lane: Lane) -> dict[str, Any]:
    """One delivery that is taken back, in seconds from the look that failed."""
    assert lane.clients is not None
    began = time.monotonic()
    name = lane.deliver(ROLLED_BACK)
    state = lane.settled(name)
    wall = time.time() - time.monotonic()
    if state is None or state.phase is not Phase.ROLLED_BACK:
        return {"rollout": name, "ended": state.label if state else None, "why": state.reason if state else ""}
    look = next(entry for entry in lane.entries(name) if entry.kind == "looked" and entry.body["verdict"] == "fail")
    seen = [answer for answer in lane.clients.answers if answer.asked >= began]
    reached = [answer.at + wall for answer in seen if answer.version == state.candidate]
    return {
        "rollout": name,
        "ended": state.label,
        "look_to_clear_s": max(reached, default=look.at) - look.body["evidence"]["at"],
        "entry_to_clear_s": max(reached, default=look.at) - look.at,
        "answers": len(reached),
        "requests": len(seen),
        "failed": sum(bool(answer.failure) for answer in seen),
    }


def measure(platform: Platform, count: int, lanes: int) -> list[dict[str, Any]]:
    """So many rollbacks, spread over the models."""
    found: list[dict[str, Any]] = []

    def work(lane: Lane, number: int) -> None:
        for _ in range(number, count, lanes):
            found.append(rollback(lane))
            print(f"{len(found)} of {count}: {found[-1]['ended']}", flush=True)

    in_lanes(platform, lanes, work)
    return found


def report(found: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """The table, the checks and the raw figures."""
    done = [one for one in found if one["ended"] == "rolled back"]

    def check(what: str, value: float, bar: str, holds: bool) -> dict[str, Any]:
        print(f"{'holds' if holds else 'FAILS'}  {what}: {value:.4g} ({bar})")
        return {"what": what, "value": round(value, 4), "bar": bar, "holds": holds}

    print(f"{'seconds':<44} {'p50':>8} {'p95':>8} {'max':>8}")
    p95 = {}
    for key, words in (
        ("look_to_clear_s", "failing look begun -> last answer by it"),
        ("entry_to_clear_s", "look in the ledger -> last answer by it"),
    ):
        values = sorted(one[key] for one in done) or [math.inf]
        p95[key] = values[max(0, -(-95 * len(values) // 100) - 1)]
        print(f"{words:<44} {statistics.median(values):8.3f} {p95[key]:8.3f} {values[-1]:8.3f}")
    failed = sum(one["failed"] for one in done)
    seen = min((one["answers"] for one in done), default=0)
    slow = p95["look_to_clear_s"]
    checks = [
        check("rollbacks", len(done), f"== {count}", len(done) == count),
        check("clients' answers by the bad version, least", seen, ">= 1", seen >= 1),
        check("from the failing look to 0 %, p95, s", slow, f"<= {BAR_S:g}", slow <= BAR_S),
        check("failed client requests", failed, "== 0", failed == 0),
    ]
    about = {"cpus": os.cpu_count(), "system": machine.platform(), "python": machine.python_version()}
    return {"checks": checks, "machine": {**about, "load": os.getloadavg()}, "raw": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollbacks", type=int, default=54)
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/rollback.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockgate-bench-") as folder:
        files = Path(folder) / "files"
        files.mkdir()
        write_rows(files / "rows")
        with running_platform(Path(folder) / "home", files) as platform:
            found = measure(platform, given.rollbacks, given.lanes)
    result = report(found, given.rollbacks)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(one["holds"] for one in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
