"""Threads that may still work when nobody waits for them any more: the process ends after them."""

from __future__ import annotations

import atexit
import threading
import time
from weakref import WeakSet

_LIMIT_S = 30.0
_threads: WeakSet[threading.Thread] = WeakSet()


def linger(thread: threading.Thread) -> None:
    """The process will not end before the thread does, for at most 30 s in all.

    Python before 3.14 kills a daemon thread that works at the process's end with `pthread_exit`. Where it is in Rust
    or C++ just then (pydantic, Arrow), that aborts the whole process, whatever it had to say with its exit status.
    """
    _threads.add(thread)


@atexit.register
def _wait() -> None:
    until = time.monotonic() + _LIMIT_S
    for thread in list(_threads):
        thread.join(max(0.0, until - time.monotonic()))
