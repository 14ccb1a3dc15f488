"""One HTTP/1.1 request over a Unix socket, on a connection of its own.

Nothing is kept of a server that may be another one by the next call. Head and body leave in one piece, so the other
side is woken once: the node agent is asked to change the traffic on machines whose cores are busy.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from contextlib import closing


class NotListening(ConnectionError):
    """Nobody accepts connections there."""


def ask(
    address: str,
    method: str,
    target: str,
    timeout_s: float,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """The answer's status and body; `address` is `unix:/path`.

    Raises NotListening, TimeoutError if the other side is silent for `timeout_s`, OSError or http.client.HTTPException
    if the connection broke or the answer is none.
    """
    lines = {"Host": "localhost", "Connection": "close", **(headers or {})}
    if body:
        lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with closing(_connected(address, timeout_s)) as connection:
        connection.sendall(head.encode("ascii") + b"\r\n" + body)
        answer = http.client.HTTPResponse(connection, method=method)
        with closing(answer):
            answer.begin()
            return answer.status, answer.read()


def _connected(address: str, timeout_s: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(timeout_s)
    try:
        made.connect(address.removeprefix("unix:"))
    except OSError as exc:
        made.close()
        raise NotListening(str(exc)) from exc
    return made
