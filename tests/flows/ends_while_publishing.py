"""Processes whose publisher is within pydantic when the main thread ends; prints how each of them ended.

`python -m tests.flows.ends_while_publishing`
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext

from pydantic import BaseModel, field_validator

from flows import publish
from tests.flows.test_publish import FakeServer, seen

_TIMES = 5
_WORKS_S = 0.5
begun = threading.Event()


class Answer(BaseModel):
    """What pydantic makes of an answer, with a validator in Python, as many of Prefect's models have them."""

    number: int

    @field_validator("number")
    @classmethod
    def _takes_its_time(cls, number: int) -> int:
        for _ in range(300):
            pass
        return number


def work() -> None:
    until = time.monotonic() + _WORKS_S
    while time.monotonic() < until:
        Answer(number=1)
        begun.set()


def end() -> None:
    """The caller's process is left as a delivery leaves its own whose Prefect server is slow."""
    publish.prefect_client = lambda _timeout_s: nullcontext(FakeServer())  # type: ignore[assignment]
    publisher = publish.Publisher(None, "local", then=work)
    publisher(seen()[0])
    begun.wait()
    publisher.close(0.0)


if __name__ == "__main__":
    codes = []
    for _ in range(_TIMES):
        child = os.fork()  # imports take longer than all the rest
        if child == 0:
            end()
            break
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
        print(*codes)
