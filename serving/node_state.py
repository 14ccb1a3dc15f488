"""What the node agent's state file says: the versions that shall run, and the routes with their leases.

A lease's age is told by the time since the machine was started, which never jumps; after a new start by the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import orjson

from policies.traffic import route_of
from serving import routes
from serving.agent_errors import BadRequest
from serving.durable import read_json
from serving.supervisor import VersionSpec


def since_boot() -> float:
    """Seconds since the machine was started, suspended time included: never jumps, and outlives the process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def written(specs: Iterable[VersionSpec], held: Iterable[routes.Held]) -> bytes:
    """The file's content."""
    now, wall = since_boot(), time.time()
    state = {
        "form": 1,
        "boot": _boot(),
        "versions": [asdict(spec) for spec in specs],
        "routes": [
            {
                "route": asdict(each.route),
                "renewed_since_boot": each.renewed,
                "renewed_at": wall - (now - each.renewed),
                "lost": asdict(each.lost) if each.lost else None,
            }
            for each in held
        ],
    }
    return orjson.dumps(state, option=orjson.OPT_INDENT_2)


def read(path: Path) -> tuple[list[VersionSpec], list[routes.Held]]:
    """What the file says; nothing where there is none. Raises BadRequest for one that is no agent's state."""
    state = read_json(path)
    if state is None:
        return [], []
    try:
        held = []
        for entry in state["routes"]:
            lost = routes.Lost(**entry["lost"]) if entry["lost"] else None
            renewed = entry["renewed_since_boot"]
            if state["boot"] != _boot():
                renewed = since_boot() - _age_by_wall_clock(entry["renewed_at"])
            held.append(routes.Held(route_of(entry["route"]), renewed, lost))
        return [VersionSpec(**entry) for entry in state["versions"]], held
    except (KeyError, TypeError, ValueError) as exc:
        raise BadRequest(f"{path} does not read as an agent's state: {exc!r}") from exc


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _age_by_wall_clock(renewed_at: float) -> float:
    """The age of a renewal from before the machine was started. One in the future has no known age: it is over."""
    age = time.time() - renewed_at
    return age if age >= 0 else float("inf")
