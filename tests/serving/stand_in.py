"""A stand-in for the model server: same command line, same paths, no model.

The "model" file is JSON that says how to behave: `{"mode": "ok" | "error" | "hang" | "slow" | "die" | "refuse"}`, with
`slow_s` for slow ones and `error_share` for those that fail now and then. SIGUSR1 makes this one process err, SIGUSR2
ends that. On SIGTERM it finishes what it has begun. It answers every infer request with its
version, the request's id and how many it has answered, so that tests can see who answered what.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

from serving.listening import closed_first

_REASONS = {200: "OK", 404: "Not Found", 500: "Internal Server Error"}


class StandIn:
    def __init__(self, arguments: argparse.Namespace, behaviour: dict[str, Any]) -> None:
        self.arguments = arguments
        self.behaviour = behaviour
        self.answered = 0
        self.under_way = 0
        self.sick = False
        self.errors = 0
        self.epoch = secrets.token_hex(4)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request, *lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.under_way += 1
                try:
                    status, answer = await self.answer(request.split(" ")[1], headers, body)
                finally:
                    self.under_way -= 1
                kept = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-length: {len(answer)}\r\n\r\n"
                writer.write(kept.encode() + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if path == "/v2/health/ready":
            return 200, b"{}"
        if path == "/metrics":
            return 200, self.metrics().encode()
        self.answered += 1
        mode = self.behaviour.get("mode", "ok")
        if mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "hang":
            await asyncio.sleep(3600)
        if mode == "slow":
            await asyncio.sleep(self.behaviour.get("slow_s", 0.2))
        if mode == "error" or self.sick or random.random() < self.behaviour.get("error_share", 0.0):
            self.errors += 1
            return 500, b'{"error": "as asked"}'
        seen = {"version": self.arguments.version, "id": headers.get("x-request-id"), "answered": self.answered}
        seen |= {"pid": os.getpid(), "apart": headers.get("x-lockgate-apart"), "path": path, "bytes": len(body)}
        seen |= {"wait_ms": headers.get("x-request-timeout-ms")}
        return 200, json.dumps(seen).encode()

    def metrics(self) -> str:
        who = f'model="{self.arguments.model}",version="{self.arguments.version}"'
        return (
            f'lockgate_process_epoch{{{who},epoch="{self.epoch}"}} 1\n'
            f'lockgate_prediction_bucket{{{who},le="0.5"}} {self.answered}\n'
            f'lockgate_prediction_bucket{{{who},le="+Inf"}} {self.answered}\n'
        )


def arguments_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("model", "version", "path", "digest", "uds", "threads", "samples", "prediction-output"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--prediction-column")
    parser.add_argument("--sample-share")
    return parser.parse_args()


def behaviour_of(arguments: argparse.Namespace) -> dict[str, Any]:
    data = Path(arguments.path).read_bytes()
    behaviour = json.loads(data)
    if hashlib.sha256(data).hexdigest() != arguments.digest or behaviour.get("mode") == "refuse":
        sys.exit("these bytes are refused")
    return behaviour


async def main() -> None:
    arguments = arguments_given()
    behaviour = behaviour_of(arguments)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(arguments.uds)  # noqa: PTH108 - nothing else runs on this loop yet
    stand_in = StandIn(arguments, behaviour)
    server = await asyncio.start_unix_server(stand_in.serve, sock=closed_first(Path(arguments.uds)))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, setattr, stand_in, "sick", True)
    loop.add_signal_handler(signal.SIGUSR2, setattr, stand_in, "sick", False)
    await stop.wait()
    server.close()
    leave = loop.time() + 5.0
    while stand_in.under_way and behaviour.get("mode") == "slow" and loop.time() < leave:  # noqa: ASYNC110 - bounded
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())
