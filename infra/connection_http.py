"""One HTTP/1.1 connection to a model server, kept open: bytes ready to send in, status and body out.

A measuring client must cost much less than what it measures, so requests are encoded once, beforehand (`request`), and
one goes out at a time. Unix sockets (`unix:/path`) and `http://host:port`.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from tasks.ports import BadInput

ANSWER_BYTES_MAX = 256 * 2**20


class Lost(ConnectionError):
    """The connection ended before the answer was whole."""


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """A whole request. The host's name means nothing to a model server."""
    head = f"{method} {path} HTTP/1.1\r\nhost: model-server\r\naccept: */*\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Connection(asyncio.Protocol):
    """Use `connect`. Not for several requests at once; `closed` once the server has ended it."""

    def __init__(self) -> None:
        import httptools

        self._httptools = httptools
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._begin()

    def _begin(self) -> None:
        self._parser: Any = self._httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    async def send(self, data: bytes, timeout_s: float) -> tuple[int, bytes]:
        """The answer's status and body. Raises Lost if the connection ends first, TimeoutError if that takes too long;
        the connection is closed then, since a late answer would be taken for the next one's."""
        if self._transport is None or self._answer is not None:
            raise Lost("the connection is not free")
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        late = loop.call_later(timeout_s, self._late, timeout_s)
        self._transport.write(data)
        try:
            return await self._answer
        finally:
            late.cancel()
            self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _late(self, timeout_s: float) -> None:
        self._fail(TimeoutError(f"no answer within {timeout_s:g} s"))

    def _fail(self, exc: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc)
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # asyncio gives a Transport to a Protocol

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Lost(f"the connection was lost{f': {exc}' if exc else ''}"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except self._httptools.HttpParserError as exc:
            self._fail(Lost(f"the answer is not HTTP: {exc}"))

    # -- httptools

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > ANSWER_BYTES_MAX:
            self._fail(Lost(f"the answer is larger than {ANSWER_BYTES_MAX} bytes"))
            return
        self._parts.append(body)

    def on_message_complete(self) -> None:
        status, body = self._parser.get_status_code(), b"".join(self._parts)
        if not self._parser.should_keep_alive():
            self.close()
        self._begin()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, body))


async def connect(url: str, timeout_s: float) -> Connection:
    """An open connection. Raises OSError or TimeoutError if there is nobody, BadInput for another kind of address."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        if url.startswith("unix:"):
            _, made = await loop.create_unix_connection(Connection, url.removeprefix("unix:"))
            return made
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise BadInput(f"'{url}' is no endpoint: write unix:/path or http://host:port")
        _, made = await loop.create_connection(Connection, parts.hostname, parts.port)
        return made
