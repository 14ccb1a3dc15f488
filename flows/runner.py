"""How a flow runs its tasks, and who runs them."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import psutil
from prefect.context import FlowRunContext

from policies import audit


class Runner(Protocol):
    """Runs a Prefect task; the simulation has its own, without the engine."""

    def __call__(self, task: Any, *args: Any, name: str = "") -> Any: ...


def directly(task: Any, *args: Any, name: str = "") -> Any:  # noqa: ARG001 - a Runner; only Prefect shows names
    """Runs a task's function without Prefect's engine: what must not wait for its server does not."""
    return task.fn(*args)


def in_prefect(task: Any, *args: Any, name: str = "") -> Any:
    """Runs a task in Prefect's engine, under a name that says what it is about."""
    return task.with_options(task_run_name=name)(*args) if name else task(*args)


def whoami() -> str:
    """This controller's name in the ledger: no other process has it."""
    return f"{_where()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


def is_dead(who: str) -> bool:
    """Whether the controller was a process of this machine that has ended. Of others, nobody here can tell."""
    where, _, rest = who.partition("/")
    pid = rest.split("/")[0]
    if where != _where() or not pid.isdecimal():
        return False
    return not psutil.pid_exists(int(pid))


def _where() -> str:
    """The machine, and the space of process numbers on it: two containers may bear one name."""
    space = Path("/proc/self/ns/pid")
    return f"{audit.clean_name(socket.gethostname())}:{space.stat().st_ino if space.exists() else ''}"


def flow_run_id() -> UUID | None:
    """The Prefect run that this is part of: whoever cancels that means the rollout."""
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None
