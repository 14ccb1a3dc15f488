"""A killed server gives up its listener before its connections."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from pathlib import Path

import pytest

from serving.listening import closed_first, free


def test_who_sees_a_killed_server_s_connection_end_is_refused_a_new_one(tmp_path: Path) -> None:
    """Accepted by a process that is dying, a second attempt would be lost with the first."""
    path = tmp_path / "server.sock"
    for _ in range(10):
        free(path)
        pid = os.fork()
        if pid == 0:
            listener = closed_first(path)
            listener.listen(64)
            accepted = []
            while True:
                accepted.append(listener.accept())
        connections = [connected(path) for _ in range(8)]
        poll = select.poll()
        for connection in connections:
            poll.register(connection, select.POLLIN | select.POLLHUP)
        os.kill(pid, signal.SIGKILL)
        assert poll.poll(10_000)
        with socket.socket(socket.AF_UNIX) as again, pytest.raises(ConnectionRefusedError):
            again.connect(str(path))
        os.waitpid(pid, 0)
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
