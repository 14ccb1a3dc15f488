"""HTTP/1.1 on one connection: bytes to exchanges, answers to bytes. Knows nothing of models.

Requests of one connection are answered one after another, in order; what a client sends ahead waits unread in the
kernel. A client that sends or takes too slowly, too much or nonsense costs its connection and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from time import perf_counter
from typing import Any

import httptools

from serving.errors import Busy, Malformed, Refused, TooLarge, TooSlow
from serving.heads import Heads
from serving.settings import HttpLimits

_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_PROMPT_S = 100e-6  # who asks again so soon after an answer is waited for awake


class Exchange:
    """One request and the chance to answer it, once. `started` is when it had arrived whole (perf_counter seconds)."""

    __slots__ = ("_connection", "body", "finished", "headers", "keep_alive", "method", "path", "started")

    def __init__(
        self,
        connection: Connection,
        method: bytes,
        path: bytes,
        headers: dict[bytes, bytes],
        body: bytes = b"",
        started: float = 0.0,
    ) -> None:
        self._connection = connection
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.keep_alive = True
        self.started = started
        self.finished = False

    @property
    def alone(self) -> bool:
        """Nobody else is connected, and this client has sent nothing more: no other request can come with this one."""
        return self._connection.only

    def reply(self, status: int, body: bytes, content_type: bytes, extra: bytes = b"") -> None:
        """Answers. `extra` is whole header lines. A second answer is a programming error."""
        assert not self.finished, "a request is answered once"
        self.finished = True
        self._connection.answer(self, status, body, content_type, extra)


class Host:
    """What the connections share: the limits, who is connected, the bytes held, and the two handlers.

    `handle` gets every whole request; `refuse` one that could not be read (its answer closes the connection).
    """

    def __init__(
        self,
        limits: HttpLimits,
        handle: Callable[[Exchange], None],
        refuse: Callable[[Exchange, Refused], None],
    ) -> None:
        self.limits = limits
        self.handle = handle
        self.refuse = refuse
        self.connections: set[Connection] = set()
        self.held = 0
        self.draining = False
        self.heads = Heads()

    def connect(self) -> Connection:
        """The protocol factory of the listening sockets."""
        return Connection(self)

    def sweep(self) -> None:
        """Ends the connections whose time is up; to be called about once a second."""
        now = perf_counter()
        for connection in list(self.connections):
            connection.check(now)

    def close_idle(self) -> None:
        """Closes every connection on which no request is under way."""
        for connection in list(self.connections):
            if connection.idle:
                connection.close()


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[Exchange] = deque()  # whole requests behind the one being answered
        self._current: Exchange | None = None  # being answered
        self._arriving: Exchange | None = None  # its head is here, its body is not
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0  # of a head that came in several pieces
        self._in_head = False
        self._parts: list[bytes] = []
        self._held = 0
        self._started: float | None = None  # the first byte of the request that is arriving
        self._active = perf_counter()
        self._stuck: float | None = None  # since when the client takes no bytes
        self._half = False  # the client sends no more, but waits for its answers
        self._failed = False  # what came could not be read; anything after it is thrown away
        self._closing = False
        self._answered = 0.0
        self._prompt = False  # the last request came at once after the answer before it
        self._awake = False
        self._whole: bytes | None = None  # what is being read, if a request begins with it

    # -- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here; one too many is told so and sent away."""
        self._transport = transport  # type: ignore[assignment]  # asyncio gives a Transport to a Protocol
        self._host.connections.add(self)
        if len(self._host.connections) > self._host.limits.connections_max:
            self._fail(Busy("connections", self._host.limits.connections_max))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The client is gone; what it asked for may still run, its answer goes nowhere."""
        self._host.connections.discard(self)
        self._host.held -= self._held
        self._held = 0
        self._transport = None
        self._parser = None  # it points back here: without the circle, memory is free at once
        self._closing = True
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._closing:
            return
        self._active = perf_counter()
        self._prompt = self._active - self._answered < _PROMPT_S
        if self._started is None:
            found = self._host.heads.find(data)
            if found is not None:
                # The parser has read this very head before, and it stands between two requests: it may rest.
                head, end = found
                self._take(Exchange(self, head.method, head.path, head.headers, data[end:], self._active))
                return
            self._started = self._active
            self._whole = data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No other protocol is spoken here; the request itself was whole and is answered as usual.
            if self._current is not None:
                self._current.keep_alive = False
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            self._fail(cause if isinstance(cause, Refused) else Malformed("the request cannot be read"))
        except httptools.HttpParserError as exc:
            self._fail(Malformed(f"this is not HTTP/1.1: {exc}"))
        self._whole = None
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._host.limits.head_max:
                self._fail(TooLarge(f"the head of the request has more than {self._host.limits.head_max} bytes"))

    def eof_received(self) -> bool:
        """The client sends no more; it may still read the answer to what it sent."""
        self._half = self._current is not None
        return self._half

    def pause_writing(self) -> None:
        """The client does not take its answers."""
        self._stuck = perf_counter()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stuck = None
        if self._current is None:
            self._next()

    # -- httptools' callbacks --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url, self._headers, self._parts = b"", {}, []
        self._in_head = True
        self._started = self._active

    def on_url(self, url: bytes) -> None:
        """Part of the request's target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line."""
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is whole: what is too large by its own word is refused before its body comes."""
        self._in_head = False
        self._head_bytes = 0
        headers = self._headers
        exchange = Exchange(self, self._parser.get_method(), self._url, headers)
        self._arriving = exchange
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._host.limits.body_max:
            raise TooLarge(self._too_large())
        if b"expect" in headers and headers[b"expect"].lower() == b"100-continue" and self._transport is not None:
            self._transport.write(_CONTINUE)

    def on_body(self, part: bytes) -> None:
        """Part of the body."""
        host = self._host
        self._parts.append(part)
        self._held += len(part)
        host.held += len(part)
        if self._held > host.limits.body_max:
            raise TooLarge(self._too_large())
        if host.held > host.limits.held_max:
            raise Busy("bytes of requests arriving", host.limits.held_max)

    def on_message_complete(self) -> None:
        """The request is whole."""
        exchange, self._arriving = self._arriving, None
        assert exchange is not None
        parts = self._parts
        exchange.body = parts[0] if len(parts) == 1 else b"".join(parts)
        exchange.keep_alive = self._parser.should_keep_alive()
        exchange.started = self._active
        self._parts = []
        self._started = None
        self._host.held -= self._held
        self._held = 0
        whole, self._whole = self._whole, None
        if whole is not None and exchange.keep_alive and not self._parser.should_upgrade():
            heads = self._host.heads
            heads.remember(whole, exchange.method, exchange.path, exchange.headers, len(exchange.body))
        self._take(exchange)

    def _take(self, exchange: Exchange) -> None:
        """A whole request: its turn is now, or after those before it."""
        if self._current is None and self._stuck is None:
            self._current = exchange
            self._host.handle(exchange)
        else:
            self._waiting.append(exchange)
            if self._transport is not None:
                self._transport.pause_reading()

    # -- answers ---------------------------------------------------------------------------------------------------

    def answer(self, exchange: Exchange, status: int, body: bytes, content_type: bytes, extra: bytes) -> None:
        """Writes the answer and turns to the next request."""
        transport = self._transport
        self._current = None
        if transport is None or transport.is_closing():
            return
        keep = exchange.keep_alive and not self._closing and not self._host.draining
        keep = keep and (not self._half or bool(self._waiting))
        body_sent = b"" if exchange.method == b"HEAD" else body
        transport.write(
            b"%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b"
            % (_STATUS[status], content_type, len(body), extra, b"" if keep else b"connection: close\r\n", body_sent)
        )
        if self._failed and transport.can_write_eof():
            # To close over bytes that nobody read would reset the connection, and the client might miss the answer.
            # So they are read and thrown away until it closes its side, whole requests among them.
            self._waiting.clear()
            transport.resume_reading()
            transport.write_eof()
        elif not keep:
            self.close()
        elif self._waiting:
            # Not at once: a client that sends thousands ahead must not deepen the stack or starve the others.
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._answered = perf_counter()
            if self._prompt and not self._awake and self.only:
                self._awake = True
                asyncio.get_running_loop().call_soon(self._stay_awake)

    def _stay_awake(self) -> None:
        """Keeps the loop turning for a moment: to be woken up takes longer than many a model."""
        if self.idle and perf_counter() - self._answered < _PROMPT_S:
            asyncio.get_running_loop().call_soon(self._stay_awake)
        else:
            self._awake = False

    def _next(self) -> None:
        if self._current is not None or self._stuck is not None or self._transport is None:
            return
        if self._waiting:
            self._current = self._waiting.popleft()
            self._current.started = perf_counter()
            self._host.handle(self._current)
        if not self._waiting and not self._closing:
            self._transport.resume_reading()

    def _fail(self, error: Refused) -> None:
        """Refuses what cannot be read; the connection closes, since nothing after it can be trusted."""
        if self._closing:
            return
        self._closing = self._failed = True
        self._started = None
        if self._current is not None:  # the answer under way goes out first, then the connection closes
            self._current.keep_alive = False
            return
        exchange = self._arriving or Exchange(self, b"", self._url, {})
        exchange.keep_alive = False
        exchange.started = perf_counter()
        self._current = exchange
        self._host.refuse(exchange, error)

    # -- time ------------------------------------------------------------------------------------------------------

    @property
    def only(self) -> bool:
        """No other client is connected."""
        return len(self._host.connections) == 1

    @property
    def idle(self) -> bool:
        """No request has begun."""
        return self._current is None and not self._waiting and self._started is None

    def check(self, now: float) -> None:
        """Ends the connection if its client is too slow or has been idle for too long."""
        limits = self._host.limits
        if self._transport is None:
            return
        waited_since = self._stuck if self._stuck is not None else self._active if self._closing else now
        if now - waited_since > limits.request_s:
            self._transport.abort()
        elif self._started is not None and now - self._started > limits.request_s:
            self._fail(TooSlow(f"the request did not arrive within {limits.request_s:g} s"))
        elif self.idle and now - self._active > limits.idle_s:
            self.close()

    def close(self) -> None:
        """Closes after what was written is sent."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def _too_large(self) -> str:
        return f"the body has more than {self._host.limits.body_max} bytes, which is the most that is taken"
