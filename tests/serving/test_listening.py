"""A killed server gives up its listener before its connections."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVER = """
import sys
from pathlib import Path
from serving.listening import closed_first, free
free(Path(sys.argv[1]))
listener = closed_first(Path(sys.argv[1]))
listener.listen(64)
accepted = []
while True:
    accepted.append(listener.accept())
"""


def test_who_sees_a_killed_server_s_connection_end_is_refused_a_new_one(tmp_path: Path) -> None:
    """Accepted by a process that is dying, a second attempt would be lost with the first."""
    path = tmp_path / "server.sock"
    for _ in range(10):
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(path)])
        connections = []
        try:
            connections = [connected(path) for _ in range(8)]
            poll = select.poll()
            for connection in connections:
                poll.register(connection, select.POLLIN | select.POLLHUP)
            server.kill()
            assert poll.poll(10_000)
            with socket.socket(socket.AF_UNIX) as again, pytest.raises(ConnectionRefusedError):
                again.connect(str(path))
        finally:
            server.kill()
            server.wait()
            for connection in connections:
                connection.close()


def connected(path: Path) -> socket.socket:
    """A connection to the server, waited for."""
    deadline = time.monotonic() + 10
    while True:
        one = socket.socket(socket.AF_UNIX)
        try:
            one.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            one.close()
            assert time.monotonic() < deadline
        else:
            return one
