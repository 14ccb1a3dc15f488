"""Deliveries that somebody dies in: `python -m tests.e2e.deadly`, a process that forks one for each line of JSON.

What is imported once (MLflow, Prefect: seconds of CPU) serves all; from the fork on it is the delivery that the command
line runs, in a process of its own. In it the ledger's `append` is watched: as soon as the entry is durable that makes
the rollout's state the named one, and before anything is done about it, the victim gets its signal.

A line: {"request": {...}, "log": FILE, "at": STATE, "victim": NAME, "signal": NUMBER}; nobody dies without `at`.
FILE.struck then says when, and whom it met.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
from rich.console import Console

from flows.run import run_delivery
from flows.settings import Settings
from flows.story import fold
from flows.wiring import configure, located
from infra.agent_client import AgentClient
from infra.ledger_sql import SqlLedger
from policies.rollout import Rollout


def name_of(state: Rollout) -> str:
    """A state as the matrix names it: where it stands, what it waits for, what it owes."""
    waits = "+".join(effect.do for effect in state.pending)
    owes = "+".join(effect.do for effect in state.outbox)
    return state.label + (f", waits for {waits}" if waits else "") + (f", owes {owes}" if owes else "")


def watch_appends(kill: Callable[[Rollout], None], at: str) -> None:
    """Calls `kill` once, between the entry that leads to the state and its effects."""
    append = SqlLedger.append
    seen: list[str] = []

    def watched(self: SqlLedger, rollout: str, *arguments: Any) -> Any:
        entry = append(self, rollout, *arguments)
        if not seen:
            state = fold(self.read(rollout))
            if state is not None and name_of(state) == at:
                seen.append(rollout)
                kill(state)
        return entry

    SqlLedger.append = watched  # type: ignore[method-assign]


def pids_of(victim: str, model: str, candidate: str) -> list[int]:
    """Whom the signal is for: as they are called in the matrix, or a file that holds a process id."""
    if victim == "flow":
        return [os.getpid()]
    if victim.startswith("/"):
        return [int(Path(victim).read_text().split()[0])]
    addresses = located(Settings())
    parts = {
        "Prefect server": {"prefect", "infra.server_prefect"},
        "MLflow server": {"mlflow"},
        "node agent": {"serving.agent"},
    }
    if victim in parts:
        return [pid for pid, command in _children(addresses.pid) if not parts[victim].isdisjoint(command)]
    if victim not in ("Envoy", "canary server", "stable server"):
        raise ValueError(f"nobody is called '{victim}'")
    status = AgentClient(addresses.agent_home).status()
    if victim == "Envoy":
        return [pid for pid in [status["gateway"]["pid"]] if pid]
    versions = status["models"].get(model, {}).get("versions", {})
    wanted = {name for name in versions if (name == candidate) == (victim == "canary server")}
    return [replica["pid"] for name in wanted for replica in versions[name]["replicas"] if replica["pid"]]


def _children(pid: int) -> Iterator[tuple[int, list[str]]]:
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # it ends just now
            yield child.pid, child.cmdline()


def strike(victim: str, number: int, note: Path, state: Rollout) -> None:
    """The signal, and a note of when and whom."""
    pids = pids_of(victim, state.model, state.candidate)
    note.write_text(json.dumps({"at": time.monotonic(), "pids": pids}))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it is being restarted: dead is dead
            os.kill(pid, number)


def deliver(job: dict[str, Any]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.dump_traceback_later(60.0)  # into the log: where it hangs, if it does
    code = 70
    try:
        if job.get("at"):
            note = Path(job["log"] + ".struck")
            watch_appends(lambda state: strike(job["victim"], job["signal"], note, state), job["at"])
        code, outcome = run_delivery(Settings(), job["request"], None, Console(stderr=True, soft_wrap=True))
        print(json.dumps(outcome), flush=True)
    except BaseException:  # noqa: BLE001 - the process is about to end without another word
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children leave no zombies
    configure(Settings())
    import infra.drift_evidently
    import infra.inspector_onnx
    import infra.probe_http
    import infra.registry_mlflow
    import infra.report_html
    import infra.router_envoy
    import infra.rows_arrow
    import infra.target_local
    import infra.telemetry  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            deliver(job)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
