"""Deaths under live load: two drawn from `make deaths`, controllers that stay dead or only stood still, and disks that
take no more. Run by `make outages`: they are too long for each test run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.story import fold
from policies.events import Phase
from policies.rollout import Rollout
from tests.e2e.deaths import (
    LEASE_S,
    SERVERS,
    SETTLED_S,
    Cell,
    Lane,
    Nursery,
    cells,
    chain_is_sound,
    exactly_once,
    line,
    write_rows,
)
from tests.e2e.running_platform import Platform, running_platform, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CANARY = "canary 40 %"
DISK = "512m"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small disk of the platform's own; None where nobody may mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, disk: Path | None) -> Iterator[Platform]:
    files = tmp_path_factory.mktemp("files")
    write_rows(files / "rows")
    home = disk / "home" if disk else tmp_path_factory.mktemp("home")
    with running_platform(home, files) as made:
        yield made
        assert not chain_is_sound(made)


@pytest.fixture(scope="module")
def lane(platform: Platform) -> Iterator[Lane]:
    """One model in service, and clients that ask it."""
    with Nursery(platform) as nursery:
        made = Lane(platform, nursery, "m0")
        made.begin()
        yield made
        made.close()


def settled(lane: Lane, name: str, *phases: Phase) -> Rollout:
    """The rollout's last state, which is one of these; everything of it happened once, and somebody serves alone."""
    state = lane.settled(name)
    assert state is not None
    assert state.settled, state
    assert state.phase in phases, state.reason
    assert not exactly_once(lane.entries(name))
    serving = state.candidate if state.phase is Phase.PROMOTED else state.stable
    wait_until(lambda: lane.serves_alone(serving), 30.0, f"v{serving} serves alone")
    return state


def no_request_failed(lane: Lane, since: float) -> None:
    assert lane.clients is not None
    assert not lane.clients.failed(since)
    assert len(lane.clients.served(since)) > 0


def answered_by(lane: Lane, version: str, since: float) -> list[float]:
    """When the clients asked what this version answered."""
    assert lane.clients is not None
    return [answer.asked for answer in lane.clients.answers if answer.version == version and answer.asked >= since]


@contextlib.contextmanager
def nobody_reconciles(platform: Platform) -> Iterator[None]:
    """The platform's reconciler stands still until the end of the block.

    Not in the middle of a write: SQLite has no way to take its lock from a process that was stopped there (PostgreSQL
    ends the session), so nobody could begin anything.
    """
    up = psutil.Process(json.loads((platform.home / "platform.json").read_text())["pid"])
    [reconciler] = [child for child in up.children() if "flows.reconciler" in child.cmdline()]
    ledger = sqlite3.connect(platform.home / "ledger.db", isolation_level=None, timeout=0.1)

    def stands_still() -> bool:
        reconciler.suspend()
        try:
            ledger.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            reconciler.resume()
            return False
        ledger.execute("ROLLBACK")
        return True

    try:
        wait_until(stands_still, 30.0, "the reconciler stands still, and does not write")
        yield
    finally:
        reconciler.resume()
        ledger.close()


def test_deaths_drawn_from_the_matrix_keep_every_promise(lane: Lane) -> None:
    """Two of those that `make deaths` plays completely."""
    seed = int(os.environ.get("LOCKGATE_DEATHS_SEED") or time.time_ns() % 10**9)
    print(f"LOCKGATE_DEATHS_SEED={seed}")
    for cell in random.Random(seed).sample(cells(SERVERS), 2):
        result = lane.play(cell)
        assert result.kept, f"LOCKGATE_DEATHS_SEED={seed}\n{line(result)}"


def test_a_controller_that_stays_dead_leaves_no_canary_behind(platform: Platform, lane: Lane) -> None:
    began = time.monotonic()
    with nobody_reconciles(platform):
        name = lane.deliver(Cell("flow", "promoted", CANARY))
        wait_until(lambda: lane.struck() is not None, SETTLED_S, "the controller is dead")
        died = (lane.struck() or {})["at"]
        over = died + LEASE_S + 5.0
        wait_until(lambda: time.monotonic() > over + 1.0, 60.0)
        candidate = name.split("-v")[1].split("-")[0]
        asked = answered_by(lane, candidate, began)
        assert asked, "it was a canary"
        assert max(asked) <= over
        assert lane.serves_alone(stable_of(lane, name))
    settled(lane, name, Phase.ROLLED_BACK)
    no_request_failed(lane, began)


@pytest.mark.parametrize("at", [CANARY, f"{CANARY}, waits for route"])
def test_a_controller_that_stood_still_gives_no_share_again(platform: Platform, lane: Lane, at: str) -> None:
    """SIGSTOP for longer than the lease, then SIGCONT: what the agent took back stays with the stable version."""
    began = time.monotonic()
    with nobody_reconciles(platform):
        name = lane.deliver(Cell("flow", "promoted", at), number=signal.SIGSTOP)
        wait_until(lambda: lane.struck() is not None, SETTLED_S, "the controller stands still")
        [pid] = (lane.struck() or {})["pids"]
        stable = stable_of(lane, name)
        wait_until(lambda: lane.serves_alone(stable), 30.0, "the agent has taken the share back")
        back = time.monotonic()
        os.kill(pid, signal.SIGCONT)
        settled(lane, name, Phase.ROLLED_BACK)
    candidate = name.split("-v")[1].split("-")[0]
    assert not [asked for asked in answered_by(lane, candidate, began) if asked > back + 0.5]
    no_request_failed(lane, began)


def stable_of(lane: Lane, name: str) -> str:
    return str(lane.entries(name)[0].body["stable"])


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not one byte more."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """The agent's folder and the ledger's: whoever opens a file there cannot write it."""
    places = [disk / "home" / "agent", *sorted((disk / "home").glob("ledger.db*"))]
    for place in places:
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    try:
        yield
    finally:
        for place in places:
            subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("trouble", [full, read_only])
def test_a_disk_that_takes_no_more_leaves_no_canary_behind_and_costs_no_request(
    lane: Lane, disk: Path | None, trouble: Callable[[Path], contextlib.AbstractContextManager[None]]
) -> None:
    """From the last entry that could be written: SQLite's log has room of its own, which lasts for some."""
    if disk is None:
        pytest.skip("only root may mount a disk that is full or cannot be written")
    began = time.monotonic()
    name = lane.deliver(Cell("", "promoted", ""))
    wait_until(lambda: lane.shares(name) > 0, SETTLED_S, "the canary has its share")
    monotonic = time.monotonic() - time.time()
    with trouble(disk):
        since = time.monotonic()

        def last_word() -> float:
            return max(since, *(entry.at + monotonic for entry in lane.entries(name)))

        def over() -> bool:
            state = fold(lane.entries(name))
            return state is None or state.phase is Phase.PROMOTED or time.monotonic() > last_word() + LEASE_S + 6.0

        wait_until(over, 120.0, "the controller has written its last entry")
        cut_off, state = last_word(), fold(lane.entries(name))
        assert state is not None
        if state.phase is not Phase.PROMOTED:
            asked = answered_by(lane, state.candidate, began)
            assert asked
            assert max(asked) <= cut_off + LEASE_S + 5.0, "its lease is over"
    settled(lane, name, Phase.ROLLED_BACK, Phase.PROMOTED)
    no_request_failed(lane, began)
