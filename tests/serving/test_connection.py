"""HTTP on a connection: whatever bytes come, the server answers or hangs up, and holds nothing back for it."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import connection
from serving.batching import Batcher, Limits, Predictor
from serving.connection import Host
from serving.endpoints import Endpoints
from serving.metrics import Metrics
from serving.model import Model
from serving.protocol import Identity
from serving.settings import HttpLimits
from tests.serving import models

BODY = json.dumps({"inputs": [{"name": "f", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]}).encode()
HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"
INFER = HEAD % len(BODY) + b"\r\n" + BODY
LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    models.score(path)
    return Model.load(path)


class Here:
    """The whole server on a socket of this process, with `host` and `metrics` to look at."""

    def __init__(self, model: Model, limits: HttpLimits) -> None:
        self.metrics = Metrics("m", "1", "e")
        self.metrics.ready = True
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(loop, model, Limits(), self.metrics, Predictor(0))
        endpoints = Endpoints(Identity("m", "1", model.signature), self.batcher, self.metrics, limits.body_max)
        self.host = Host(limits, endpoints.handle, endpoints.refuse)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.get_running_loop().create_server(self.host.connect, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            self.host.close_idle()


async def talk(port: Any, *parts: bytes, half_close: bool = True) -> bytes:
    """Sends the parts, each for itself, and reads until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read()
    except OSError:  # reset: the server hung up on bytes that it did not read
        return b""
    finally:
        writer.close()


def told(model: Model, story: Callable[[Here, Any], Coroutine[Any, Any, None]], **limits: Any) -> Here:
    async def run() -> Here:
        here = Here(model, HttpLimits(**limits))
        async with here.listening() as port:
            await story(here, port)
            for _ in range(200):
                if not here.host.connections:
                    break
                await asyncio.sleep(0.01)
        assert here.host.held == 0
        assert here.batcher.idle
        return here

    return asyncio.run(run())


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def test_requests_sent_ahead_are_answered_in_order(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        answer = await talk(port, (INFER + LIVE) * 100)
        assert statuses(answer) == [200] * 200
        assert [b"score" in part for part in answer.split(b"HTTP/1.1 ")[1:]] == [True, False] * 100

    told(model, story)


def infer(*values: float, head: bytes = b"") -> bytes:
    tensor = {"name": "f", "datatype": "FP32", "shape": [1, 4], "data": values}
    body = json.dumps({"inputs": [tensor]}).encode()
    return HEAD % len(body) + head + b"\r\n" + body


def test_a_head_that_came_before_means_the_same_again_however_its_bytes_come(model: Model) -> None:
    first, other = infer(0, 0, 0, 0), infer(9, 9, 9, 9)

    async def story(here: Here, port: Any) -> None:
        for ahead in (
            (first,),
            (other, first[:30], first[30:]),
            (first + other, other),
            (other[:-1], other[-1:], first),
        ):
            answer = await talk(port, *ahead)
            scores = [part.partition(b'"data":[')[2][:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
            assert scores == [b"0.5" if request[:-4].endswith(b"0") else b"1.0" for request in _cut(b"".join(ahead))]
        assert len(here.host.heads) == 1
        assert statuses(await talk(port, first[:-10])) == []

    told(model, story)


def test_a_head_that_came_before_needs_no_parser(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent by itself and whole, as clients do that wait for their answer. Envoy's differ by their request id."""

    class Unread:
        def __init__(self, _connection: object) -> None: ...

        def feed_data(self, data: bytes) -> None:
            raise AssertionError(data)

    async def story(here: Here, port: Any) -> None:
        seen = []
        handle = here.host.handle
        here.host.handle = lambda exchange: (seen.append(exchange.headers), handle(exchange))[1]
        ids = [b"x-request-id: one\r\n", b""]  # both are kept as one head, which is that of neither
        for line in ids:
            assert statuses(await talk(port, infer(0, 0, 0, 0, head=line + b"x-other: 1\r\n"))) == [200]
        monkeypatch.setattr(connection.httptools, "HttpRequestParser", Unread)
        for line in (*ids, b"x-request-id: two\r\n"):
            assert statuses(await talk(port, infer(9, 9, 9, 9, head=line + b"x-other: 1\r\n"))) == [200]
        assert [headers.get(b"x-request-id") for headers in seen] == [b"one", None, b"one", None, b"two"]
        assert all(headers[b"x-other"] == b"1" and headers[b"host"] == b"x" for headers in seen)

    told(model, story)


def _cut(data: bytes) -> list[bytes]:
    return [b"POST" + part for part in data.split(b"POST")[1:]]


@pytest.mark.parametrize(
    "line",
    [
        b"x-request-id: 7\r\nX-Request-Id: 8\r\n",
        b"X-Request-ID: 7\r\n",
        b"x-request-id: a b\r\n",
        b"authorization: secret\r\n",
        b"connection: close\r\n",
        b"expect: 100-continue\r\n",
    ],
)
def test_a_head_that_will_not_come_again_is_not_remembered(model: Model, line: bytes) -> None:
    async def story(here: Here, port: Any) -> None:
        assert 200 in statuses(await talk(port, infer(1, 2, 3, 4, head=line)))
        assert not here.host.heads

    told(model, story)


def test_remembered_heads_are_bounded(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        for at in range(600):
            assert statuses(await talk(port, infer(0, 0, 0, 0, head=b"x-other: %d\r\n" % at))) == [200]
        assert 0 < len(here.host.heads) <= 256

    told(model, story)


@pytest.mark.parametrize(("pause_s", "others", "awake"), [(0, 0, True), (0.6, 0, False), (0, 1, False)])
def test_a_lone_client_who_asks_again_at_once_is_waited_for_awake_for_a_moment(
    model: Model, monkeypatch: pytest.MonkeyPatch, pause_s: float, others: int, awake: bool
) -> None:
    monkeypatch.setattr(connection, "_PROMPT_S", 0.5)

    async def story(here: Here, port: Any) -> None:
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1 + others)]
        for reader, writer in clients:  # each is known to the server once it is answered
            writer.write(LIVE)
            await reader.readuntil(b"true}")
        reader, writer = clients[0]
        turns = 0
        stay = connection.Connection._stay_awake

        def counted(self: connection.Connection) -> None:
            nonlocal turns
            turns += 1
            stay(self)

        monkeypatch.setattr(connection.Connection, "_stay_awake", counted)
        for _ in range(3):
            await asyncio.sleep(pause_s)
            writer.write(LIVE)
            await reader.readuntil(b"true}")
        await asyncio.sleep(0.6)
        assert (turns > 10) is awake
        turns = 0
        await asyncio.sleep(0.1)
        assert turns == 0  # and then it sleeps
        for _, one in clients:
            one.close()

    told(model, story)


def test_a_request_in_single_bytes_is_a_request(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        assert statuses(await talk(port, *(bytes([byte]) for byte in INFER))) == [200]

    told(model, story)


def test_a_chunked_body_is_a_body(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        head = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        chunks = b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in BODY)
        assert statuses(await talk(port, head + chunks + b"0\r\n\r\n")) == [200]

    told(model, story)


def test_a_compressed_body_is_unpacked_up_to_the_limit(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        for body, expected in ((gzip.compress(BODY), 200), (gzip.compress(bytes(10**6)), 413), (b"no gzip", 400)):
            request = HEAD % len(body) + b"content-encoding: gzip\r\n\r\n" + body
            assert statuses(await talk(port, request)) == [expected]

    told(model, story, body_max=100_000)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET /v2/models/other HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"DELETE /metrics HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 100_000, 413),
        (b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: 999999999\r\n\r\n", 413),
        (b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (HEAD % 2 + b"inference-header-content-length: x\r\n\r\n{}", 400),
        (HEAD % 2 + b"x-request-timeout-ms: soon\r\n\r\n{}", 400),
        (HEAD % len(BODY) + b"x-request-timeout-ms: 0\r\n\r\n" + BODY, 503),
        (HEAD % 2 + b"content-encoding: br\r\n\r\n{}", 400),
        (b"GET /v2%2Fhealth/live?x=1 HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"GET /v2/health/live/ HTTP/1.0\r\n\r\n", 200),
        (b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", 200),
    ],
)
def test_every_request_has_its_status(model: Model, request_: bytes, status: int) -> None:
    async def story(here: Here, port: Any) -> None:
        answer = await talk(port, request_)
        assert statuses(answer) == [status]
        if status in (429, 503):
            assert b"retry-after: 1\r\n" in answer

    told(model, story, body_max=10_000)


def test_a_head_request_has_no_body(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        answer = await talk(port, LIVE.replace(b"GET", b"HEAD"))
        assert answer.endswith(b"\r\n\r\n")
        assert b"content-length: 13" in answer

    told(model, story)


def test_who_expects_100_continue_gets_it_before_sending(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % len(BODY) + b"expect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(BODY)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()

    told(model, story)


def test_who_sends_too_slowly_is_told_so_and_let_go(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(INFER[:-1])
        async with asyncio.timeout(10):
            while not here.host.connections:  # noqa: ASYNC110 - it is another task's
                await asyncio.sleep(0)
            answer = asyncio.ensure_future(reader.read())
            while not answer.done():
                here.host.sweep()
                await asyncio.sleep(0)
        assert statuses(answer.result()) == [408]
        writer.close()

    assert told(model, story, request_s=0.05).metrics.requests[408] == 1


def test_who_is_idle_for_too_long_is_let_go(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LIVE)
        await reader.readuntil(b'{"live":true}')
        reading = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(10):
            while not reading.done():
                here.host.sweep()
                await asyncio.sleep(0)
        assert reading.result() == b""
        writer.close()

    told(model, story, idle_s=0.01)


def test_one_connection_too_many_is_sent_away(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        first = await asyncio.open_connection("127.0.0.1", port)
        first[1].write(LIVE)
        await first[0].readuntil(b"\r\n\r\n")
        answer = await talk(port, half_close=False)
        assert statuses(answer) == [429]
        first[1].close()

    told(model, story, connections_max=1)


def test_bodies_of_all_connections_together_are_bounded(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        half = HEAD % 1500 + b"\r\n" + bytes(1000)
        first = await asyncio.open_connection("127.0.0.1", port)
        first[1].write(half)
        async with asyncio.timeout(10):
            while here.host.held < 1000:  # noqa: ASYNC110 - it is the server's side
                await asyncio.sleep(0)
        assert statuses(await talk(port, half, half_close=False)) == [429]
        first[1].close()

    told(model, story, held_max=1500)


def test_who_leaves_before_the_answer_disturbs_nobody(model: Model) -> None:
    async def story(here: Here, port: Any) -> None:
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(INFER * 5)
            writer.transport.abort()
        assert statuses(await talk(port, INFER)) == [200]

    told(model, story)


@pytest.mark.parametrize("ahead", [INFER, INFER * 2, INFER * 5])
def test_nonsense_behind_requests_ends_the_connection_once_the_client_has_closed_its_side(
    model: Model, ahead: bytes
) -> None:
    async def story(here: Here, port: Any) -> None:
        _, other = await asyncio.open_connection("127.0.0.1", port)  # so that answers come a turn later
        assert statuses(await talk(port, ahead + b"\0\0\r\n\r\n"))[0] == 200
        async with asyncio.timeout(10):
            while len(here.host.connections) > 1:  # noqa: ASYNC110 - nobody says when a connection is gone
                await asyncio.sleep(0.01)
        other.close()

    told(model, story, request_s=60)


PIECES = st.sampled_from([INFER, LIVE, BODY, INFER[:50], HEAD % 2 + b"\r\n", b"\0" * 9]) | (
    st.sampled_from([b"\r\n", b"\r\n\r\n", b"POST ", b" HTTP/1.1", b"content-length: 10\r\n", b"0\r\n\r\n"])
    | st.sampled_from([b"transfer-encoding: chunked\r\n", b"ffffffffffffffff\r\n", b"upgrade: x\r\n"])
    | st.binary(max_size=40)
)


def mutated(pieces: list[bytes], cuts: list[tuple[int, int]]) -> bytes:
    data = bytearray(b"".join(pieces))
    for at, byte in cuts:
        if data:
            data[at % len(data)] = byte
    return bytes(data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(PIECES, max_size=8),
    cuts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    split=st.integers(1, 200),
)
def test_whatever_bytes_come_the_server_answers_or_hangs_up(
    model: Model, pieces: list[bytes], cuts: list[tuple[int, int]], split: int
) -> None:
    """No hang, no 5xx, nothing held afterwards, and the next client is served."""

    async def story(here: Here, port: Any) -> None:
        data = mutated(pieces, cuts)
        parts = [data[at : at + split] for at in range(0, len(data), split)]
        answer = await talk(port, *parts)
        assert not any(status >= 500 for status in statuses(answer))
        assert statuses(await talk(port, INFER)) == [200]

    told(model, story, request_s=5)
