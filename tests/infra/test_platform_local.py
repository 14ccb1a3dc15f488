"""The local platform: one in a folder; and whoever dies is started again, later and later, but never too late."""

from __future__ import annotations

import errno
import os
import socket
import sys
from itertools import pairwise
from pathlib import Path
from subprocess import SubprocessError

import pytest

from infra import platform_local
from infra.part_local import Part
from infra.platform_local import LocalPlatform, PortBusy, free_port, lock, running
from tasks.ports import PortError

IDLE = ["-c", "import time; time.sleep(600)"]


class Idle(LocalPlatform):
    """A platform whose parts do nothing."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, free_port(), free_port(), free_port())

    def _prefect(self) -> Part:
        return self._part("Prefect", IDLE, lambda: True, {})

    def _mlflow(self) -> Part:
        return self._part("MLflow", IDLE, lambda: True, {})

    def _agent(self) -> Part:
        return self._part("Agent", IDLE, lambda: True, {})


class Dead:
    """A process that has ended."""

    returncode = -9


class Time:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(platform_local, "time", made)
    return made


def test_a_platform_of_a_version_that_takes_no_lock_keeps_its_file(tmp_path: Path) -> None:
    first, second = Idle(tmp_path), Idle(tmp_path)
    try:
        first.start()
        assert first._lock is not None
        os.close(first._lock)
        before = (tmp_path / "platform.json").read_bytes()
        with pytest.raises(PortError, match=rf"runs in .* already \(process {os.getpid()}\)"):
            second.start()
        second.stop()
        assert (tmp_path / "platform.json").read_bytes() == before
    finally:
        first._lock = None
        first.stop()


def test_a_folder_that_cannot_be_locked_is_not_called_another_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("infra.platform_local.fcntl.flock", refuse)
    with pytest.raises(PortError, match="cannot be locked: No locks available; set LOCKGATE_HOME"):
        Idle(tmp_path).start()


def test_a_second_platform_in_a_folder_is_refused_from_the_first_s_first_step_to_its_last(tmp_path: Path) -> None:
    first, second = Idle(tmp_path), Idle(tmp_path)
    refused = []

    def try_as_well(said: str) -> None:
        with pytest.raises(PortError, match=rf"already, .* \(process {os.getpid()}\)"):
            second.start()
        second.stop()  # as the demo does, whatever has happened
        refused.append((said, second.parts))

    try:
        addresses = first.start(try_as_well)
        assert refused == [(f"{part} is ready", []) for part in ("Prefect", "MLflow", "Agent")]
        try_as_well("it runs")
        here = running(tmp_path)
        assert here is not None
        assert (here.gateway_port, here.ready) == (addresses.gateway_port, True)
    finally:
        first.stop()
    assert running(tmp_path) is None
    assert not (tmp_path / "platform.json").exists()
    try:
        second.start()
    finally:
        second.stop()


def test_a_start_that_fails_leaves_the_folder_to_others(tmp_path: Path) -> None:
    platform = Idle(tmp_path)
    with socket.create_server(("127.0.0.1", platform.mlflow_port)), pytest.raises(PortBusy, match="--mlflow-port"):
        platform.start()
    os.close(lock(tmp_path))


def test_what_outlives_its_supervisor_does_not_hold_the_folder(tmp_path: Path) -> None:
    held = lock(tmp_path)
    part = Part("Agent", [sys.executable, *IDLE], {}, tmp_path / "agent.log")
    part.start()
    try:
        os.close(held)  # as the system does when a process dies
        os.close(lock(tmp_path))
    finally:
        part.stop()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PortError, match=r"file cannot be used: .*LOCKGATE_HOME"):
        lock(tmp_path / "file")


def away(platform: LocalPlatform, clock: Time, lives_s: float) -> float:
    """How long the platform's only part is away when it dies after so many seconds of life."""
    [part] = platform.parts
    started: list[float] = []
    part.process = Dead()  # type: ignore[assignment]
    part.code = lambda: -9  # type: ignore[method-assign]
    part.start = lambda: started.append(clock.now)  # type: ignore[method-assign]
    part.started_at, died = clock.now - lives_s, clock.now
    while not started:
        list(platform.supervise())
        clock.now += 0.05
    return started[0] - died


def test_a_part_that_dies_again_and_again_is_started_later_and_later(clock: Time, tmp_path: Path) -> None:
    platform = LocalPlatform(tmp_path)
    platform.parts = [platform._prefect()]
    waited = [away(platform, clock, lives_s=1.0) for _ in range(10)]
    assert waited == sorted(waited)
    assert waited[0] < 0.5
    assert waited[-1] == pytest.approx(30.0, abs=0.2)
    platform.parts[0].restarts = 2000
    assert away(platform, clock, lives_s=1.0) == pytest.approx(30.0, abs=0.2), "after hours, too"
    assert away(platform, clock, lives_s=100.0) < 0.5, "one that has run steadily is started at once"


def test_who_keeps_the_leases_is_never_away_for_long(clock: Time, tmp_path: Path) -> None:
    """While the agent is away nobody takes a canary's share back."""
    platform = LocalPlatform(tmp_path)
    platform.parts = [platform._agent()]
    assert max(away(platform, clock, lives_s=1.0) for _ in range(20)) < 1.5


@pytest.mark.parametrize("error", [BlockingIOError(11, "no process left"), SubprocessError("no memory left")])
def test_a_part_that_cannot_be_started_again_is_tried_later_and_later_and_the_others_go_on(
    clock: Time, tmp_path: Path, error: Exception
) -> None:
    platform = LocalPlatform(tmp_path)
    broken, sound = platform.parts = [platform._mlflow(), platform._prefect()]
    for part in platform.parts:
        part.process, part.code = Dead(), lambda: -9  # type: ignore[assignment, method-assign]
    broken.log.mkdir(parents=True)  # nothing can be read there
    tried: list[float] = []
    started: list[str] = []

    def fail() -> None:
        tried.append(clock.now)
        if len(tried) < 12:
            raise error
        started.append("broken")

    broken.start, sound.start = fail, lambda: started.append("sound")  # type: ignore[method-assign]
    said: list[str] = []
    while "broken" not in started:
        said += platform.supervise()
        clock.now += 0.05
    assert "sound" in started
    assert "its log cannot be read" in said[0]
    assert any(f"MLflow could not be started again: {error}; again in 0.4 s" in line for line in said)
    waits = [later - sooner for sooner, later in pairwise(tried)]
    assert waits == sorted(waits)
    assert waits[0] < 0.5
    assert waits[-1] == pytest.approx(30.0, abs=0.2)
