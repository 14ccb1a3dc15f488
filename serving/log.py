"""What a process says of itself: lines on its output, which its log keeps. A disk that takes no more costs the line.

Python's own streams would raise, and keep what they could not write for the next one that they then cannot write.
"""

from __future__ import annotations

import contextlib
import os


def say(line: str) -> None:
    """A line on the standard output."""
    _write(1, line)


def complain(line: str) -> None:
    """A line on the standard error."""
    _write(2, line)


def _write(descriptor: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, (line.rstrip() + "\n").encode(errors="backslashreplace"))
