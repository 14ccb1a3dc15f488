"""The Unix sockets that servers listen on: taken over from the dead, and given up in the right order when they die."""

from __future__ import annotations

import fcntl
import resource
import socket
from pathlib import Path

_HIGH = 4096  # beyond the descriptors of a server's connections, and no larger a table of them than need be


def free(path: Path) -> None:
    """Takes away the socket that a dead process left. Raises OSError when somebody listens there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            return
    raise OSError(98, "somebody listens there already")


def closed_first(path: Path) -> socket.socket:
    """A socket bound to `path` that a killed process closes before any of its connections.

    Linux closes what a dying process had open from the highest descriptor down. Whoever sees a connection end, and asks
    a second time, is then refused at once (and may wait for the next process) instead of being accepted by nobody.
    """
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(str(path))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        high = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, min(soft, _HIGH) - 8)
    return socket.socket(fileno=high)
