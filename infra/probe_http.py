"""Probe: asks model servers directly, over the Open Inference Protocol v2 (JSON).

`ask` sends rows in chunks; a chunk that is refused is sent again row by row, so that a failure is told of the row that
has it. `race` measures versions in turns (A B B A ...) in short slices on the same rows, one row a request: latency on
one connection, then throughput on eight; what the machine does meanwhile falls on all of them alike.

It runs an event loop in a thread of its own, so that it can be called from anywhere.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from infra import rows as rows_file
from infra.connection_http import Connection, Lost, connect, request
from tasks.ports import Answers, BadInput, Endpoint, PortError, Signature, Speed, Tensor

RACE_ROWS_MAX = 2000  # encoded beforehand; after the last the first comes again
WARM_UP_REQUESTS = 20
CONNECTIONS = 8
# Many short turns: what else the machine does comes in bursts, and a burst must fall on all versions.
_SLICE_S = (0.015, 0.1)  # least and longest
_TURNS = 40  # slices per version and measurement, if they are then not too short
_TIMED_MIN = 400  # fewer leave a p99 without an upper limit (368 at 95 %), and a busy machine answers fewer
_LONGER = 5  # times, at most
_BUSY = frozenset({429, 503})
_BUSY_TRIES = 5
_MEMORY = re.compile(rb"^process_resident_memory_bytes(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)
_LOAD = re.compile(rb"^lockgate_model_load_seconds(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)
_GONE = (OSError, TimeoutError, Lost)

T = TypeVar("T")


class HttpProbe:
    """`tasks.ports.Probe`. `timeout_s` is for one request; a server that takes longer has failed that request."""

    def __init__(self, chunk_rows: int = 128, timeout_s: float = 10.0, ask_s_max: float = 300.0) -> None:
        self._chunk_rows = chunk_rows
        self._timeout_s = timeout_s
        self._ask_s_max = ask_s_max

    def ask(self, endpoint: Endpoint, rows: Path, label: str | None, limit: int) -> Answers:
        """The predictions for up to `limit` rows in the file's order. Raises PortError if the server is not there,
        BadInput if the rows do not fit its signature."""
        return _run(lambda: self._ask(endpoint, rows, label, limit))

    def race(self, endpoints: Sequence[Endpoint], rows: Path, label: str | None, duration_s: float) -> list[Speed]:
        """Each endpoint's speed on the same rows, measured interleaved in the same run, `duration_s` in all; for up to
        three times as long where the machine is too busy for enough requests.

        `memory_mb` (10^6 bytes) is what the server reports after the run; `load_s` what it reports, 0 if it does not.
        """
        return _run(lambda: self._race(endpoints, rows, label, duration_s))

    # -- ask

    async def _ask(self, endpoint: Endpoint, path: Path, label: str | None, limit: int) -> Answers:
        server = _Server(endpoint, self._timeout_s)
        async with server.open(1) as (connection,):
            signature = await server.signature(connection)
            feeds = _feeds(path, signature, label, limit)
            reader = _Reader(endpoint, signature)
            count = len(next(iter(feeds.values())))
            chunk = _chunk(signature, self._chunk_rows, path)
            predictions: list[float] = []
            failures: list[str] = []
            deadline = time.monotonic() + self._ask_s_max
            for start in range(0, count, chunk):
                if time.monotonic() > deadline:
                    raise PortError(f"{server}: answered {start} of {count} rows within {self._ask_s_max:g} s")
                size = min(chunk, count - start)
                body = _body(feeds, signature, start, size, reader.output)
                values, why = await server.predictions(body, reader, size)
                if why and size > 1:
                    for row in range(start, start + size):
                        single = _body(feeds, signature, row, 1, reader.output)
                        one, why = await server.predictions(single, reader, 1)
                        predictions += one
                        failures += [f"row {row}: {why}"] if why else []
                else:
                    predictions += values
                    failures += [f"row {start}: {why}"] if why else []
        return Answers(tuple(predictions), tuple(failures))

    # -- race

    async def _race(
        self, endpoints: Sequence[Endpoint], path: Path, label: str | None, duration_s: float
    ) -> list[Speed]:
        lanes = [await self._lane(endpoint, path, label) for endpoint in endpoints]
        if not lanes:
            return []
        for lane in lanes:
            await lane.warm_up()
        # Two measurements, each with as many turns of each version.
        each_s = duration_s / 2 / len(lanes)
        slice_s = min(max(each_s / _TURNS, _SLICE_S[0]), _SLICE_S[1])
        for connections in (1, CONNECTIONS):
            planned = max(1, round(each_s / slice_s))
            for turn in range(_LONGER * planned):
                if turn >= planned and (connections > 1 or all(lane.is_known for lane in lanes)):
                    break
                for lane in lanes if turn % 2 == 0 else reversed(lanes):
                    await lane.slice(connections, slice_s)
        return [await lane.speed() for lane in lanes]

    async def _lane(self, endpoint: Endpoint, path: Path, label: str | None) -> _Lane:
        server = _Server(endpoint, self._timeout_s)
        async with server.open(1) as (connection,):
            signature = await server.signature(connection)
        feeds = _feeds(path, signature, label, RACE_ROWS_MAX)
        size = _fixed_rows(signature) or 1
        count = len(next(iter(feeds.values())))
        if count < size:
            raise BadInput(f"{path}: the model takes {size} rows at once, and the file has {count}")
        bodies = [
            server.infer(_body(feeds, signature, start, size, None)) for start in range(0, count - size + 1, size)
        ]
        return _Lane(server, bodies)


@dataclass
class _Lane:
    """One version in the race: what it is asked, and what was measured so far."""

    server: _Server
    bodies: Sequence[bytes]
    latency_ms: list[float] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    busy_s: float = 0.0
    busy_answers: int = 0

    def __post_init__(self) -> None:
        self._next: dict[int, Iterator[bytes]] = {}  # per measurement, so that all versions get the same rows in it

    @property
    def is_known(self) -> bool:
        """Whether nothing more has to be seen of it: it fails, or there are enough requests to bound its p99."""
        return self.failed > 0 or len(self.latency_ms) >= _TIMED_MIN

    async def warm_up(self) -> None:
        """A few requests that do not count."""
        async with self.server.open(1) as (connection,):
            for body in self.bodies[:WARM_UP_REQUESTS]:
                try:
                    await connection.send(body, self.server.timeout_s)
                except _GONE:
                    return  # the measurement will say so

    async def slice(self, connections: int, length_s: float) -> None:
        """Sends one request after the other on each connection for so long; what is under way is waited for."""
        bodies = self._next.setdefault(connections, cycle(self.bodies))
        answered_before = self.requests - self.failed
        async with self.server.open(connections) as opened:
            begun = time.perf_counter()
            until = begun + length_s
            await asyncio.gather(*(self._stream(one, bodies, until, connections == 1) for one in opened))
            took_s = time.perf_counter() - begun
        if connections > 1:
            self.busy_s += took_s
            self.busy_answers += self.requests - self.failed - answered_before

    async def _stream(self, connection: Connection, bodies: Iterator[bytes], until: float, timed: bool) -> None:
        clock = time.perf_counter
        while (begun := clock()) < until:
            self.requests += 1
            try:
                status, _ = await connection.send(next(bodies), self.server.timeout_s)
            except _GONE:
                self.failed += 1
                return  # this connection is spent; the next slice opens new ones
            if status != 200:
                self.failed += 1
            elif timed:
                self.latency_ms.append((clock() - begun) * 1000)

    async def speed(self) -> Speed:
        metrics = await self.server.metrics()
        return Speed(
            requests=self.requests,
            failed=self.failed,
            latency_ms=tuple(self.latency_ms),
            throughput_rps=self.busy_answers / self.busy_s if self.busy_s else 0.0,
            memory_mb=_number(_MEMORY, metrics) / 1e6,
            load_s=_number(_LOAD, metrics),
        )


@dataclass(frozen=True)
class _Server:
    endpoint: Endpoint
    timeout_s: float

    def __str__(self) -> str:
        return f"'{self.endpoint.model}' version {self.endpoint.version} at {self.endpoint.url}"

    @property
    def _path(self) -> str:
        return f"/v2/models/{quote(self.endpoint.model, safe='')}"

    def infer(self, body: bytes) -> bytes:
        return request("POST", f"{self._path}/infer", body)

    @asynccontextmanager
    async def open(self, count: int) -> AsyncIterator[list[Connection]]:
        """So many connections, closed afterwards. Raises PortError if the server takes none."""
        opened: list[Connection] = []
        try:
            for _ in range(count):
                opened.append(await connect(self.endpoint.url, self.timeout_s))
            yield opened
        except (OSError, TimeoutError) as exc:
            raise PortError(f"{self} is not there: {exc or type(exc).__name__}") from exc
        finally:
            for connection in opened:
                connection.close()

    async def get(self, connection: Connection, path: str) -> bytes:
        try:
            status, body = await connection.send(request("GET", path), self.timeout_s)
        except _GONE as exc:
            raise PortError(f"{self} does not answer {path}: {exc}") from exc
        if status != 200:
            raise PortError(f"{self} answers {status} to {path}: {_error(body)}")
        return body

    async def metrics(self) -> bytes:
        async with self.open(1) as (connection,):
            return await self.get(connection, "/metrics")

    async def signature(self, connection: Connection) -> Signature:
        """The metadata that the server gives of its model."""
        try:
            described = _json(await self.get(connection, self._path))
            inputs, outputs = (
                tuple(Tensor(t["name"], t["datatype"], tuple(t["shape"])) for t in described[side])
                for side in ("inputs", "outputs")
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise PortError(f"{self} describes its model in another form than the protocol's: {exc!r}") from exc
        if not inputs:
            raise PortError(f"{self} says that its model has no inputs")
        return Signature(inputs, outputs)

    async def predictions(self, body: bytes, reader: _Reader, size: int) -> tuple[list[float], str]:
        """The prediction of each row, and why there is none (all NaN then, or where it is not a number).

        Each call has a connection of its own: one that a crash has taken away must not fail the rows that follow.
        """
        nothing = [math.nan] * size
        for attempt in range(_BUSY_TRIES):
            async with self.open(1) as (connection,):
                try:
                    status, answer = await connection.send(self.infer(body), self.timeout_s)
                except _GONE as exc:
                    return nothing, str(exc)
            if status == 200:
                return reader.read(answer, size)
            if status not in _BUSY:
                break
            await asyncio.sleep(0.05 * 2**attempt)
        return nothing, f"{status} {_error(answer)}"


class _Reader:
    """Finds the prediction in an answer: the named output, or the last float one; in it, one column."""

    def __init__(self, endpoint: Endpoint, signature: Signature) -> None:
        names = [tensor.name for tensor in signature.outputs]
        floats = [tensor.name for tensor in signature.outputs if tensor.dtype.startswith("FP")]
        wanted = endpoint.prediction_output
        if wanted is not None and wanted not in names:
            raise BadInput(
                f"the model has no output '{wanted}' to take the prediction from; it has: {', '.join(names)}"
            )
        if wanted is None and not floats:
            raise BadInput(f"none of the model's outputs ({', '.join(names)}) is a float; say which is the prediction")
        self.output = wanted or floats[-1]
        self._column = endpoint.prediction_column

    def read(self, answer: bytes, size: int) -> tuple[list[float], str]:
        import numpy as np

        nothing = [math.nan] * size
        try:
            tensor = next(t for t in _json(answer)["outputs"] if t["name"] == self.output)
            values = np.asarray(tensor["data"], dtype=np.float64).reshape(size, -1)
            column = values[:, self._column]
        except StopIteration:
            return nothing, f"the answer has no output '{self.output}'"
        except IndexError:
            return nothing, f"output '{self.output}' has {values.shape[1]} columns, and not column {self._column}"
        except (ValueError, KeyError, TypeError) as exc:
            return nothing, f"the answer is not as the protocol has it: {exc}"
        finite = np.isfinite(column)
        return column.tolist(), "" if finite.all() else f"the prediction is {column[~finite][0]}, not a number"


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The coroutine's result, from an event loop in a thread of its own: the caller may have one running."""
    import uvloop

    def own_loop() -> T:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work())

    with ThreadPoolExecutor(1, thread_name_prefix="probe") as pool:
        return pool.submit(own_loop).result()


def _feeds(path: Path, signature: Signature, label: str | None, limit: int) -> dict[str, Any]:
    table = rows_file.read(path, limit=limit, text=rows_file.text_inputs(signature))
    if label is not None:
        rows_file.values(table, label, path, "label")  # a file without it is another file than was meant
    return rows_file.feeds(table, signature, path, label)


def _fixed_rows(signature: Signature) -> int | None:
    """How many rows the model takes at once, if it takes only so many."""
    fixed = {tensor.shape[0] for tensor in signature.inputs if tensor.shape and tensor.shape[0] > 0}
    return max(fixed) if fixed else None


def _chunk(signature: Signature, wanted: int, path: Path) -> int:
    fixed = _fixed_rows(signature)
    if fixed is not None and fixed > 1:
        raise BadInput(f"{path}: the model takes exactly {fixed} rows at once; export it with a free first axis")
    return fixed or wanted


def _body(feeds: dict[str, Any], signature: Signature, start: int, size: int, output: str | None) -> bytes:
    import numpy as np
    import orjson

    inputs = []
    for tensor in signature.inputs:
        values = feeds[tensor.name][start : start + size]
        shape = list(values.shape)
        flat = values.reshape(-1)
        if tensor.dtype == "FP16":
            flat = flat.astype(np.float32)
        data = flat.tolist() if flat.dtype == object else np.ascontiguousarray(flat)
        inputs.append({"name": tensor.name, "shape": shape, "datatype": tensor.dtype, "data": data})
    asked: dict[str, Any] = {"inputs": inputs}
    if output is not None:
        asked["outputs"] = [{"name": output}]
    return orjson.dumps(asked, option=orjson.OPT_SERIALIZE_NUMPY)


def _json(body: bytes) -> Any:
    import orjson

    return orjson.loads(body)


def _error(body: bytes) -> str:
    """What the server says went wrong, in at most 200 characters."""
    try:
        said = str(_json(body)["error"])
    except (ValueError, KeyError, TypeError):
        said = body.decode("utf-8", "replace")
    return " ".join(said.split())[:200]


def _number(pattern: re.Pattern[bytes], metrics: bytes) -> float:
    match = pattern.search(metrics)
    return float(match[1]) if match else 0.0
