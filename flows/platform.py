"""The local platform from the command line: started, watched over, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

from rich.console import Console

from flows.settings import Settings
from flows.wiring import located, platform, ready, supervisor_of
from serving.log import say
from tasks.ports import BadInput, PortError

_DETACH_S = 180.0
_STOP_S = 60.0


def up(settings: Settings, detach: bool, out: Console, err: Console) -> int:
    """Starts the platform and stays with it until Ctrl-C or SIGTERM; returns the exit code."""
    if detach:
        return _up_detached(settings, out, err)
    signal.signal(signal.SIGTERM, _interrupt)
    local = platform(settings)
    try:
        local.start(lambda text: out.print(f"  {text}", markup=False))
    except PortError as exc:
        err.print(f"lockgate: {exc}", markup=False)
        return 2 if isinstance(exc, BadInput) else 3
    except KeyboardInterrupt:
        return 0
    try:
        _say_where(settings, out)
        while True:
            for line in local.supervise():
                say(f"  {time.strftime('%H:%M:%S')} {line}")
            time.sleep(0.2)
    except KeyboardInterrupt:
        return 0
    finally:
        say("stopping ...")
        local.stop()


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _say_where(settings: Settings, out: Console) -> None:
    addresses = located(settings)
    out.print("The platform is up. Ctrl-C (or `lockgate down`) ends it; the data stays.", markup=False)
    out.print(
        f"  Prefect  {addresses.prefect}\n  MLflow   {addresses.mlflow}\n  gateway  {addresses.gateway}", markup=False
    )
    if addresses.evidently:
        out.print(f"  Evidently  {addresses.evidently}", markup=False)
    out.print(f"  data and logs in {settings.folder}", markup=False)


def _up_detached(settings: Settings, out: Console, err: Console) -> int:
    """Starts the supervisor as a process of its own, and waits until it says that all is ready."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    log = settings.folder / "up.log"
    with log.open("ab") as sink:  # one that runs already writes there, too
        before = sink.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up"],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings.variables()},
            start_new_session=True,
        )
    limit = time.monotonic() + _DETACH_S
    with out.status("starting Prefect, MLflow, agent, gateway and worker ..."):
        while time.monotonic() < limit:
            if process.poll() is not None:
                err.print(log.read_bytes()[before:].decode(errors="replace").strip(), markup=False)
                return process.returncode or 3
            if supervisor_of(settings) == process.pid and ready(settings):
                _say_where(settings, out)
                return 0
            time.sleep(0.2)
    process.terminate()
    err.print(f"lockgate: the platform was not up after {_DETACH_S:.0f} s; see {log}", markup=False)
    return 3


def down(settings: Settings, out: Console) -> int:
    """Ends the platform that runs in the settings' folder; 0 also if none does."""
    pid = supervisor_of(settings)
    if pid is None:
        out.print(f"no platform runs in {settings.folder}", markup=False)
        return 0
    os.kill(pid, signal.SIGTERM)
    limit = time.monotonic() + _STOP_S
    while time.monotonic() < limit:
        if supervisor_of(settings) is None:
            out.print("stopped; the data stays in " + str(settings.folder), markup=False)
            return 0
        time.sleep(0.2)
    raise PortError(f"process {pid} did not stop within {_STOP_S:.0f} s")
