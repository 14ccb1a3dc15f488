"""A long life in short: much traffic of every kind, good and bad, and the memory stays flat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from pathlib import Path

import pytest

from tests.serving import models
from tests.serving.running_server import running, wait_for

GOOD = {"inputs": [{"name": "f", "datatype": "FP32", "shape": [8, 4], "data": [0.5] * 32}]}
BODIES = [
    ("/v2/models/m/infer", json.dumps(GOOD).encode()),
    ("/v1/models/m:predict", b'{"instances":[[1,2,3,4]]}'),
    ("/invocations", b'{"dataframe_split":{"columns":["a","b","c","d"],"data":[[1,2,3,4]]}}'),
    ("/v2/models/m/infer", b"not json"),
    ("/v2/models/m/infer", b'{"inputs":[{"name":"f","datatype":"FP32","shape":[1,4],"data":[1]}]}'),
    ("/nothing/%d", b""),
]
CONNECTIONS = 8
WARM, MEASURED = 4_000, 24_000  # requests


async def client(port: int, requests: int, at: int) -> None:
    """`requests` requests; every so often over a new connection, and now and then one broken off half-way."""
    reader = writer = None
    for number in range(requests):
        if writer is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        path, body = BODIES[(number + at) % len(BODIES)]
        path = path % (number * CONNECTIONS + at) if "%d" in path else path
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {at}-{number}\r\ncontent-length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        if number % 97 == 96:
            writer.write(request[: len(request) // 2])
            writer.close()
            reader = writer = None
            continue
        writer.write(request)
        assert reader is not None
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
    if writer is not None:
        writer.close()


@pytest.mark.e2e
def test_memory_stays_flat(tmp_path: Path) -> None:
    """After the warm-up, six times as much traffic may not add more than a few megabytes."""
    models.score(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx", "--samples", str(tmp_path / "rows"), "--samples-max-mb", "1") as server:
        port = int(server.url.rpartition(":")[2])

        async def drive(requests: int) -> None:
            async with asyncio.timeout(240), asyncio.TaskGroup() as group:
                for at in range(CONNECTIONS):
                    group.create_task(client(port, requests // CONNECTIONS, at))

        asyncio.run(drive(WARM))
        wait_for(lambda: any((tmp_path / "rows").glob("*.arrow")))  # the writer has loaded what it needs, once
        before = server.metric("process_resident_memory_bytes")
        asyncio.run(drive(MEASURED))
        grown_mb = (server.metric("process_resident_memory_bytes") - before) / 2**20
        assert grown_mb < 8, f"{grown_mb:.1f} MB more after {MEASURED} requests"
        assert server.metric("lockgate_errors_total") == 0
        assert server.metric("lockgate_queue_rows") <= 64
        assert server.stop() == (0, "")
    assert sum(path.stat().st_size for path in (tmp_path / "rows").glob("*.arrow")) <= 2 * 2**20


WHOLE = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
PIECES = [
    *(WHOLE % (path.encode(), len(body), body) for path, body in BODIES),
    b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /v2/models/m/infer HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n",
    b'POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: 4000\r\n\r\n{"inputs":' + b"[" * 3990,
    b"\r\n\r\n",
    b"\0" * 40,
    b"x-header: " + b"y" * 9000 + b"\r\n",
]
HOSTILE_WARM, HOSTILE = 300, 1_500  # connections


@pytest.mark.e2e
def test_hostile_bytes_leave_nothing_behind(tmp_path: Path) -> None:
    """Requests cut, joined and with bytes changed: each connection ends, and the process is as large as before."""
    models.score(tmp_path / "m.onnx")
    chance = random.Random(3)

    def attack(port: int, connections: int) -> None:
        for _ in range(connections):
            data = bytearray(b"".join(chance.choices(PIECES, k=chance.randint(1, 4))))
            for _ in range(chance.randint(0, 5)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with socket.create_connection(("127.0.0.1", port), timeout=60) as peer, contextlib.suppress(OSError):
                peer.sendall(data[: chance.randint(1, len(data))])
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass

    with running(tmp_path / "m.onnx") as server:
        port = int(server.url.rpartition(":")[2])
        attack(port, HOSTILE_WARM)
        before = server.metric("process_resident_memory_bytes")
        attack(port, HOSTILE)
        grown_mb = (server.metric("process_resident_memory_bytes") - before) / 2**20
        assert grown_mb < 4, f"{grown_mb:.1f} MB more after {HOSTILE} connections"
        assert server.metric("lockgate_errors_total") == 0
        assert server.stop() == (0, "")
