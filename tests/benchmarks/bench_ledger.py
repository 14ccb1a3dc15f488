"""What the ledger costs, and whether a long history makes it slow: `python -m tests.benchmarks.bench_ledger`.

A ledger of a million entries (by default) is written in bulk: rollouts of 500 entries each, 20 of them interleaved at
any time, nearly all entries looks with a report. Then, at that size and in a ledger that has only begun, in turns:
durable appends of one writer and of four at once, the fold of one rollout, what a delivery and a reconciliation ask
for; and, at that size, the fold of everything and the check of the whole chain.

`--postgresql` does the same on a server of its own (with fsync). Writes `build/benchmarks/ledger-DATABASE.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from infra import ledger_schema as schema
from infra.ledger_sql import SqlLedger
from policies import audit
from policies.audit import Head
from policies.events import Checked, Done, Event, Looked, Ordered, Phase, Requested, Stop, Terms, from_body, to_body
from policies.rollout import Rollout, fold, step
from policies.verdict import Verdict
from tests.infra.postgresql_server import postgresql, programs

LENGTH = 500  # entries of a rollout
ABREAST = 20  # rollouts under way at the same time
BATCH = 10_000
ROUNDS = 7
TERMS = Terms((Stop(Phase.CANARY, 5, 0, 1e9),), 0.0, 0, 1e9, 30.0, 600.0, "rollback")
REPORT = {
    "gate": "errors",
    "verdict": "hold",
    "says": "0.12 % against 0.11 %",
    "n": 18231,
    "low": -0.001,
    "high": 0.004,
}
Row = dict[str, Any]


# ---------------------------------------------------------------- a long history


def stories(entries: int, tag: int) -> Iterator[tuple[str, Event, dict[str, Any]]]:
    """Rollouts, interleaved; the effects that end each of them are named by `rows`, which knows the numbers."""
    for group in range(entries // (LENGTH * ABREAST)):
        names = [f"m{n % 50}-v{tag}-{n}" for n in range(group * ABREAST, (group + 1) * ABREAST)]
        for name in names:
            yield (
                name,
                Requested(0.0, 0, name.split("-")[0], "2", "d" * 64, "1", TERMS),
                {"policy": {"name": "p" * 800}},
            )
        for _ in range(3):
            for name in names:
                yield name, Done(0.0, 0, ""), {}  # the check, the deployment, the route
        for _ in range(LENGTH - 8):
            for name in names:
                yield name, Looked(0.0, 0, Verdict.HOLD, "not enough yet"), {"reports": [REPORT]}
        for name in names:
            yield name, Ordered(0.0, 0, "abort", "superseded"), {}
        for _ in range(3):
            for name in names:
                yield name, Done(0.0, 0, ""), {}  # the route, then what is left


def rows(entries: int, head: Head) -> Iterator[Row]:
    """The entries as stored rows, chained; every rollout is settled at its end."""
    states: dict[str, Rollout | None] = {}
    sequences: dict[str, int] = {}
    for name, event, extra in stories(entries, head.number):
        number, at = head.number + 1, 1e9 + head.number
        state = states.get(name)
        if isinstance(event, Done) and state is not None:
            wanted = (*state.pending, *state.outbox)[0]
            checks = wanted.do == "check"
            event = Checked(at, number, Verdict.PASS, "fine") if checks else Done(at, number, wanted.id)
        event = replace(event, at=at, number=number)
        if not isinstance(event, Looked):  # a look that holds changes nothing that names an effect
            states[name], _ = step(state, event)
        sequences[name] = sequences.get(name, 0) + 1
        kind, body = to_body(event)
        text = audit.canonical({**body, **extra})
        own = audit.seal(audit.line(number, name, sequences[name], at, "bench", kind, text, head.hash))
        yield {
            "number": number, "rollout": name, "sequence": sequences[name], "at": at, "actor": "bench", "kind": kind,
            "body": text, "previous_hash": head.hash, "hash": own,
        }  # fmt: skip
        head = Head(number, own)
        finished = states[name]
        if finished is not None and finished.settled:
            del states[name]


def fill(ledger: SqlLedger, entries: int) -> None:
    """Writes the history, and that all of it is settled, as the reconciliations of its time would have."""
    batch: list[Row] = []
    for row in rows(entries, ledger.head()):
        batch.append(row)
        if len(batch) == BATCH:
            insert(ledger, batch)
            batch = []
    if batch:
        insert(ledger, batch)
    with ledger._write() as connection:
        known = sa.select(schema.settled.c.rollout)
        names = sa.select(schema.entries.c.rollout).distinct().where(schema.entries.c.rollout.not_in(known))
        connection.execute(sa.insert(schema.settled).from_select(["rollout"], names))
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("ANALYZE")


def insert(ledger: SqlLedger, batch: list[Row]) -> None:
    with ledger._write() as connection:
        connection.execute(sa.insert(schema.entries), batch)


# ---------------------------------------------------------------- measurements


def timed(times: int, call: Callable[[], object]) -> float:
    """The median of so many calls, in milliseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


def appends(ledger: SqlLedger, name: str, count: int) -> list[float]:
    """Durable appends, one after the other; the milliseconds of each."""
    taken = []
    for sequence in range(1, count + 1):
        began = time.perf_counter()
        ledger.append(name, sequence, 1e9, "bench", "noted", {"reports": [REPORT]})
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def folded(ledger: SqlLedger, name: str) -> Rollout:
    state = fold(from_body(entry.kind, entry.body, entry.at, entry.number) for entry in ledger.read(name))
    assert state is not None
    return state


def measure(ledger: SqlLedger, tag: str) -> dict[str, float]:
    """Everything whose cost must not grow with the history."""
    one = appends(ledger, f"{tag}-one", 60)
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: appends(ledger, f"{tag}-four-{n}", 25), range(4)))
    four_s = time.perf_counter() - began
    names = ledger.rollouts()
    some = names[:: max(1, len(names) // 15)][:15]
    assert folded(ledger, some[0]).settled
    return {
        "appends_per_s": 1000 * len(one) / sum(one),
        "append_ms_p50": statistics.median(one),
        "append_ms_max": max(one),
        "appends_per_s_of_4_writers": 100 / four_s,
        "fold_one_ms": statistics.median(timed(3, lambda name=name: folded(ledger, name)) for name in some),
        "rollouts_of_a_model_ms": timed(9, lambda: ledger.rollouts("m7")),
        "unsettled_ms": timed(9, ledger.unsettled),
        "quarantined_ms": timed(9, lambda: ledger.quarantined("d" * 64)),
        "head_ms": timed(9, ledger.head),
    }


def whole(ledger: SqlLedger) -> dict[str, float]:
    """What reads everything, in seconds."""
    began = time.perf_counter()
    found = audit.verify(ledger.lines(), ledger.head())
    verify_s = time.perf_counter() - began
    assert found.breach is None, found
    began = time.perf_counter()
    names = ledger.rollouts()
    for name in names:
        folded(ledger, name)
    fold_s = time.perf_counter() - began
    return {
        "entries": found.head.number,
        "rollouts": len(names),
        "verify_all_s": verify_s,
        "fold_all_s": fold_s,
        "fold_all_entries_per_s": LENGTH * len(names) / fold_s,
    }


@contextlib.contextmanager
def database(kind: str) -> Iterator[str]:
    """The URL of an empty database."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="lockgate-bench-") as folder:
            yield f"sqlite:///{folder}/ledger.db"
        return
    found = programs()
    if found is None:
        raise SystemExit("no PostgreSQL server is installed (on Debian and Ubuntu: apt-get install postgresql)")
    with postgresql(found, fsync=True) as url:
        yield url


def run(kind: str, entries: int) -> dict[str, Any]:
    with database(kind) as small_url, database(kind) as large_url:
        small, large = SqlLedger(small_url), SqlLedger(large_url)
        fill(small, LENGTH * ABREAST)
        began = time.perf_counter()
        fill(large, entries)
        fill_s = time.perf_counter() - began
        pairs = [(measure(small, f"round-{n}"), measure(large, f"round-{n}")) for n in range(ROUNDS)]
        everything = whole(large)
        small.close()
        large.close()
    median = [{key: statistics.median(one[at][key] for one in pairs) for key in pairs[0][at]} for at in (0, 1)]
    return {"database": kind, "small": median[0], "large": median[1], "whole": everything, "fill_s": fill_s}


def checks_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    small, large = raw["small"], raw["large"]
    entries = raw["whole"]["entries"]

    def grows(what: str, key: str, bar: float) -> dict[str, Any]:
        value = large[key] / small[key]
        text = f"{what}: {large[key]:.2f} ms at {entries} entries, times the {small[key]:.2f} ms at the beginning"
        return {"what": text, "value": round(value, 2), "bar": f"<= {bar}", "holds": value <= bar}

    return [
        {
            "what": "durable appends a second, one writer",
            "value": round(large["appends_per_s"]),
            "bar": ">= 20",  # twenty rollouts at once that look once a second
            "holds": large["appends_per_s"] >= 20,
        },
        {
            "what": "durable appends a second, four writers",
            "value": round(large["appends_per_s_of_4_writers"]),
            "bar": ">= 20",
            "holds": large["appends_per_s_of_4_writers"] >= 20,
        },
        grows(f"fold of one rollout of {LENGTH} entries", "fold_one_ms", 3.0),
        grows("append", "append_ms_p50", 3.0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--postgresql", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    given = parser.parse_args()
    raw = run("postgresql" if given.postgresql else "sqlite", given.entries)
    checks = checks_of(raw)
    for check in checks:
        print(f"{'holds' if check['holds'] else 'FAILS'}  {check['what']}: {check['value']} ({check['bar']})")
    for name in ("small", "large", "whole"):
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in raw[name].items()))
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"ledger-{raw['database']}.json"
    path.write_text(json.dumps({"checks": checks, "machine": machine, "raw": raw}, indent=2) + "\n")
    return 0 if all(check["holds"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
