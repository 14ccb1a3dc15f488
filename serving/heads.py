"""Heads of requests that the parser has read before: clients send the same one again and again, but for its id."""

from __future__ import annotations

import re

_MAX = 256  # heads
_LENGTH_MAX = 2048  # bytes; longer ones are not remembered
# A head with one of these will not come again, or is more than a head (and a secret is not kept longer than needed).
_UNLIKE = (b"traceparent", b"authorization", b"cookie", b"transfer-encoding", b"expect")
_ID = b"\r\nx-request-id: "  # as Envoy writes it
_PLAIN_ID = re.compile(rb"[!-~]{1,256}")


class Head:
    """What a request's head came to; `length`: the bytes of body that follow it."""

    __slots__ = ("headers", "length", "method", "path")

    def __init__(self, method: bytes, path: bytes, headers: dict[bytes, bytes], length: int) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.length = length


class Heads:
    """The heads that one server remembers, by their bytes without the request's id; bounded."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, data: bytes) -> tuple[Head, int] | None:
        """The head of the one whole request that `data` is, and where its body begins; None: the parser must tell."""
        end = data.find(b"\r\n\r\n", 0, _LENGTH_MAX) + 4
        same, request_id = _without_id(data[:end])
        head = self._known.get(same)
        if head is None or len(data) != end + head.length:
            return None
        if request_id is None:
            return head, end
        return Head(head.method, head.path, {**head.headers, b"x-request-id": request_id}, head.length), end

    def remember(self, data: bytes, method: bytes, path: bytes, headers: dict[bytes, bytes], length: int) -> None:
        """Keeps what the head came to, if `data` is this request, whole and alone, and its head may come again."""
        end = len(data) - length
        if data.find(b"\r\n\r\n", 0, _LENGTH_MAX) + 4 != end:
            return
        if int(headers.get(b"content-length", b"0")) != length or any(name in headers for name in _UNLIKE):
            return
        same, request_id = _without_id(data[:end])
        if headers.get(b"x-request-id") != request_id or b"x-request-id" in same.lower():
            return
        if len(self._known) >= _MAX:
            self._known.clear()
        kept = {name: value for name, value in headers.items() if name != b"x-request-id"}
        self._known[same] = Head(method, path, kept, length)


def _without_id(head: bytes) -> tuple[bytes, bytes | None]:
    """The head without its request id, and the id; the head as it is, and None, where no plain id is found."""
    at = head.find(_ID)
    if at < 0:
        return head, None
    end = head.find(b"\r\n", at + 2)
    request_id = head[at + len(_ID) : end]
    if _PLAIN_ID.fullmatch(request_id) is None:
        return head, None
    return head[:at] + head[end:], request_id
