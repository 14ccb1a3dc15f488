"""The demo's clients: rows of a file, in order, one request each, at a steady rate, in a process of its own.

The load is open: request `n` is due `n / rps` seconds after the start, whatever became of those before it, and its
latency counts from then. So a slow server is seen as slow, not as less traffic. At most `clients` requests are under
way at a time; each waits for its own answer and then takes the next row. Requests are the Open Inference Protocol's
(v2), JSON, to `{url}/v2/models/{model}/infer`, over connections that are kept.

What has happened so far stands in a small JSON file, replaced at once (renamed) about twice a second and at the end:

    {"requests": 4200, "failed": 0, "rps": 199.8, "row": 4201, "rounds": 0, "running": true, "updated": 1700000000.0,
     "served": {"1": 4000, "2": 200}, "latency_ms": {"p50": 2.1, "p90": 3.4, "p99": 9.1, "max": 40.2},
     "failures": [{"at": …, "row": 17, "status": 503, "error": "…"}]}

`requests` were answered or failed; `served` by which version, as the gateway says; `failed` were not answered with
status 200; `failures` are the newest 20. A request that is due while the process is being stopped is not sent; those
under way are waited for. Exit code 0 when stopped or done, 2 for rows or options that cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import sys
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from policies.evidence import LATENCY_EDGES_MS

if TYPE_CHECKING:
    import aiohttp

CLIENTS: Final = 24
TIMEOUT_S: Final = 10.0
WRITE_EVERY_S: Final = 0.5
FAILURES_KEPT: Final = 20
_ERROR_CHARACTERS_MAX: Final = 300


class RowsUnusable(ValueError):
    """The rows cannot be sent; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Replay:
    """What to send where. `rows_max` ends it after so many requests; by default it goes on until it is stopped, and
    after the last row comes row `repeat_from` (rows that no model was trained on) again."""

    url: str
    model: str
    rps: float
    clients: int = CLIENTS
    timeout_s: float = TIMEOUT_S
    repeat_from: int = 0
    rows_max: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rps <= 100_000:
            raise RowsUnusable(f"{self.rps:g} requests a second cannot be sent; choose more than 0, at most 100,000")
        if self.clients < 1:
            raise RowsUnusable(f"{self.clients} clients cannot send anything; choose at least 1")
        if self.repeat_from < 0:
            raise RowsUnusable(f"row {self.repeat_from} to repeat from does not exist; the first row is 0")


@dataclass
class Tally:
    """What came of the requests so far; its size does not grow with them."""

    requests: int = 0
    failed: int = 0
    row: int = 0
    rounds: int = 0
    slowest_ms: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_EDGES_MS) + 1))
    served: Counter[str] = field(default_factory=Counter)
    failures: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=FAILURES_KEPT))

    def add(
        self, row: int, latency_ms: float, failure: tuple[int | None, str] | None, at: float, version: str = ""
    ) -> None:
        """One request's end; `failure` is its status (None: there was no answer) and why it does not count as one."""
        self.requests += 1
        self.served[version] += bool(version)
        self.slowest_ms = max(self.slowest_ms, latency_ms)
        self.buckets[bisect_left(LATENCY_EDGES_MS, latency_ms)] += 1
        if failure is not None:
            self.failed += 1
            status, error = failure
            self.failures.append({"at": at, "row": row, "status": status, "error": error[:_ERROR_CHARACTERS_MAX]})

    def quantile_ms(self, share: float) -> float:
        """The upper edge of the bucket that holds the quantile (12 % wide), never above the slowest; 0 for none."""
        wanted, seen = share * self.requests, 0
        for edge, count in zip(LATENCY_EDGES_MS, self.buckets, strict=False):
            seen += count
            if count and seen >= wanted:
                return min(edge, self.slowest_ms)
        return self.slowest_ms

    def document(self, elapsed_s: float, running: bool, at: float) -> dict[str, Any]:
        """What is written to the file."""
        latency = {name: round(self.quantile_ms(q), 3) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
        return {
            "requests": self.requests,
            "failed": self.failed,
            "rps": round(self.requests / elapsed_s, 1) if elapsed_s > 0 else 0.0,
            "row": self.row,
            "rounds": self.rounds,
            "running": running,
            "served": {version: count for version, count in sorted(self.served.items()) if count},
            "updated": at,
            "latency_ms": {**latency, "max": round(self.slowest_ms, 3)},
            "failures": list(self.failures),
        }


def order(rows: int, repeat_from: int) -> Iterator[int]:
    """The rows' numbers in the order of their requests: all of them, then those from `repeat_from` on, again and again.
    A `repeat_from` beyond the last row repeats the last."""
    again = min(repeat_from, rows - 1)
    return itertools.chain(range(rows), itertools.cycle(range(again, rows)))


class Bodies:
    """The request bodies of a Parquet file's rows: an input [1, 1] per column but the label. Raises RowsUnusable."""

    def __init__(self, path: Path, label: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as exc:
            raise RowsUnusable(f"{path}: not readable as Parquet: {exc}") from exc
        if table.num_rows == 0:
            raise RowsUnusable(f"{path}: has no rows to send")
        self._rows = int(table.num_rows)
        self._columns: list[tuple[str, str, list[Any]]] = []
        for name in table.column_names:
            if name == label:
                continue
            column = table.column(name)
            if column.null_count:
                raise RowsUnusable(f"{path}: column '{name}' has {column.null_count} nulls, which JSON cannot carry")
            self._columns.append((name, _datatype(path, name, column.type), column.to_pylist()))
        if not self._columns:
            raise RowsUnusable(f"{path}: has no column beside the label '{label}'")

    def __len__(self) -> int:
        return self._rows

    def __call__(self, row: int) -> bytes:
        import orjson

        inputs = [
            {"name": name, "shape": [1, 1], "datatype": kind, "data": [values[row]]}
            for name, kind, values in self._columns
        ]
        return orjson.dumps({"inputs": inputs})


def _datatype(path: Path, name: str, kind: Any) -> str:
    """The Open Inference Protocol's name of an Arrow type."""
    names = {"string": "BYTES", "large_string": "BYTES", "float": "FP32", "double": "FP64", "bool": "BOOL"}
    names |= {f"int{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)}
    found = names.get(str(kind))
    if found is None:
        raise RowsUnusable(f"{path}: column '{name}' is of type {kind}, which cannot be sent; use one of {list(names)}")
    return found


async def run(replay: Replay, bodies: Bodies, out: Path, stop: asyncio.Event) -> Tally:
    """Sends until `stop` is set or `rows_max` is reached; writes `out` all the while, and once more at the end."""
    import aiohttp

    tally = Tally()
    began = time.monotonic()
    every = enumerate(order(len(bodies), replay.repeat_from))
    tickets = itertools.islice(every, replay.rows_max)  # None: no end
    url = f"{replay.url.rstrip('/')}/v2/models/{quote(replay.model, safe='')}/infer"
    timeout = aiohttp.ClientTimeout(total=replay.timeout_s)
    connector = aiohttp.TCPConnector(limit=replay.clients)
    writing = asyncio.create_task(_keep_written(tally, out, began))
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(replay.clients):
                group.create_task(_client(session, url, replay, bodies, tickets, tally, began, stop))
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        _write(out, tally.document(time.monotonic() - began, running=False, at=time.time()))
    return tally


async def _client(
    session: aiohttp.ClientSession,
    url: str,
    replay: Replay,
    bodies: Bodies,
    tickets: Iterator[tuple[int, int]],
    tally: Tally,
    began: float,
    stop: asyncio.Event,
) -> None:
    """One client: takes the next row, waits until it is due, sends it, waits for the answer."""
    for number, row in tickets:
        due = began + number / replay.rps
        if await _stopped_before(stop, due):
            return
        tally.row = max(tally.row, row) if number < len(bodies) else row
        tally.rounds = 0 if number < len(bodies) else 1
        version, failure = await _ask(session, url, bodies(row))
        tally.add(row, 1000 * (time.monotonic() - due), failure, time.time(), version)


async def _stopped_before(stop: asyncio.Event, due: float) -> bool:
    wait = due - time.monotonic()
    if wait > 0 and not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), wait)
        except TimeoutError:
            return False
    return stop.is_set()


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[str, tuple[int | None, str] | None]:
    """The version that answered, as the gateway says; and, unless that was an answer with status 200 and outputs, the
    status and what was wrong."""
    import aiohttp

    try:
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
            text = await response.read()
            version = response.headers.get("x-lockgate-version", "")
            if response.status != 200:
                return version, (response.status, text.decode("utf-8", "replace"))
            if b'"outputs"' not in text:
                return version, (response.status, f"an answer without outputs: {text.decode('utf-8', 'replace')}")
            return version, None
    except (aiohttp.ClientError, OSError, TimeoutError) as exc:
        return "", (None, f"{type(exc).__name__}: {exc}")


async def _keep_written(tally: Tally, out: Path, began: float) -> None:
    while True:
        _write(out, tally.document(time.monotonic() - began, running=True, at=time.time()))
        await asyncio.sleep(WRITE_EVERY_S)


def _write(out: Path, document: dict[str, Any]) -> None:
    aside = out.with_name(f".{out.name}.aside")
    aside.write_text(json.dumps(document))
    aside.replace(out)


async def _until_stopped(replay: Replay, bodies: Bodies, out: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run(replay, bodies, out, stop)


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.clients_replay", description="Replays rows as live requests."
    )
    parser.add_argument("--url", required=True, help="the gateway, like http://127.0.0.1:8080")
    parser.add_argument("--rows", type=Path, required=True, help="a Parquet file: an input per column")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rps", type=float, required=True, help="requests a second")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that tells what happened so far")
    parser.add_argument("--label", default="label", help="the column that is not sent")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="requests under way at most")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds until a request counts as failed")
    parser.add_argument("--repeat-from", type=int, default=None, help="after the last row goes on here; default: half")
    parser.add_argument("--rows-max", type=int, default=None, help="ends after so many requests")
    given = parser.parse_args()
    try:
        bodies = Bodies(given.rows, given.label)
        repeat_from = len(bodies) // 2 if given.repeat_from is None else given.repeat_from
        replay = Replay(
            given.url, given.model, given.rps, given.clients, given.timeout, repeat_from, rows_max=given.rows_max
        )
    except RowsUnusable as exc:
        sys.stderr.write(f"{exc}\n")
        return 2
    asyncio.run(_until_stopped(replay, bodies, given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
