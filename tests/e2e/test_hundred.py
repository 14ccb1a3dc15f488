"""A hundred deliveries of one model at once: one rollout at any instant, and none is lost or comes twice."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flows import turn
from flows.deliver import to_the_end
from flows.delivery import Delivery
from flows.orders import over
from flows.rollout import Controller
from flows.turn import start
from infra.ledger_sql import SqlLedger
from policies import audit, rollout
from policies.events import Phase, from_body
from policies.policy_yaml import parse
from policies.rollout import Rollout
from policies.verdict import GateReport, Verdict
from tasks.ports import Entry
from tests.e2e import shared_world
from tests.e2e.shared_world import FastClock, Remote
from tests.infra.postgresql_server import postgresql, programs_or_skip
from tests.stories.world import MODEL, directly

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COUNT = 100
PROCESSES = 4
SPEED = 16.0
POLICY = """
policy: crowd
rollout:
  on_conflict: {on_conflict}
  stages:
    - canary: {{weight: 50, for: 1s}}
  gates:
    errors: {{margin: 0.05}}
  watch: {{for: 1s, shadow: 1.0}}
  look_every: 1s
  burn_in: 0s
  lease: 1000s
"""


def deliver_some(
    url: str, address: Any, key: bytes, clock: FastClock, on_conflict: str, numbers: list[int]
) -> dict[int, str]:
    """One process: its versions, all at once; by version, why it was turned away (nothing if it was rolled out)."""
    turn.BEGIN_S = 16 * turn.BEGIN_S  # nobody is dead here, and this clock runs faster than the machine
    ledger = SqlLedger(url, clock.now)
    ports = shared_world.ports(address, key, clock, ledger)
    policy = parse(POLICY.format(on_conflict=on_conflict))
    request = Delivery(model=MODEL, source="x.onnx", policy="")

    def deliver_one(number: int) -> str:
        version = ports.registry.version(MODEL, str(number))
        name = f"{MODEL}-v{number}"
        turned_away = start(ports, policy, version, request, name)
        if turned_away is None:
            controller = Controller(ports, name, f"crowd-{number}", directly, lambda *_: [FINE])
            to_the_end(ports, name, "local", controller.drive)
        return turned_away or ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return dict(zip(numbers, pool.map(deliver_one, numbers), strict=True))


FINE = GateReport("quality", Verdict.PASS, "fine")


def crowd(url: str, on_conflict: str) -> tuple[dict[int, str], dict[str, list[Entry]], str | None]:
    """All of them at once; who was turned away, the rollouts' entries, and the version that serves in the end."""
    clock = FastClock(time.time(), SPEED)
    server = shared_world.serve(clock, rps=500.0)
    key = bytes(multiprocessing.current_process().authkey)
    try:
        versions = list(range(2, COUNT + 2))
        if on_conflict == "queue":
            stand_in_line(url)
        work = partial(deliver_some, url, server.address, key, clock, on_conflict)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["flows.deliver", "infra.ledger_sql", "tests.e2e.shared_world"])
        with ProcessPoolExecutor(PROCESSES, context) as pool:
            outcomes = pool.map(work, [versions[at::PROCESSES] for at in range(PROCESSES)])
            turned_away = {number: why for each in outcomes for number, why in each.items()}
        route = Remote("router", server.world()).current(MODEL)  # type: ignore[attr-defined]
    finally:
        server.shutdown()
    ledger = SqlLedger(url)
    entries = {name: ledger.read(name) for name in reversed(ledger.rollouts(MODEL))}
    assert ledger.unsettled() == []
    assert ledger.claim(MODEL, "local", "whoever comes next") == "whoever comes next"
    assert audit.verify(ledger.lines(), ledger.head()).breach is None
    ledger.close()
    assert route.candidate is None
    return turned_away, entries, route.stable


def in_line() -> list[str]:
    """The rollouts in an order that is neither the versions' nor the processes'."""
    return [f"{MODEL}-v{number}" for number in random.Random(5).sample(range(2, COUNT + 2), COUNT)]


def stand_in_line(url: str) -> None:
    """All of them have come, one after the other, before the first is rolled out."""
    ledger = SqlLedger(url)
    for name in in_line():
        assert ledger.claim(MODEL, "local", name, in_line=True) == in_line()[0]
    ledger.close()


def states(entries: list[Entry]) -> list[tuple[int, Rollout]]:
    """The rollout's state after each of its entries, with the entry's place in the ledger."""
    state, seen = None, []
    for entry in entries:
        state, _ = rollout.step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
        seen.append((entry.number, state))
    return seen


def check_one_at_a_time(rollouts: dict[str, list[Entry]]) -> list[Rollout]:
    """Each rollout began when the one before it was over; their last states, in the order in which they came."""
    last, ended_at = [], 0
    for entries in rollouts.values():
        assert entries[0].number > ended_at, f"{entries[0].rollout} began before the one before it was over"
        seen = states(entries)
        ended_at = next(number for number, state in seen if over(state))
        last.append(seen[-1][1])
    return last


def check_none_lost(turned_away: dict[int, str], ended: list[Rollout]) -> None:
    """Each delivery was turned away with a reason, or had exactly one rollout, which is over."""
    rolled_out = [int(state.candidate) for state in ended]
    assert len(rolled_out) == len(set(rolled_out)), "a version was rolled out twice"
    away = {number for number, why in turned_away.items() if why}
    assert sorted([*rolled_out, *away]) == list(range(2, COUNT + 2))
    assert all(state.settled for state in ended)


def url_of(database: str, folder: Path, stack: ExitStack) -> str:
    """An empty database."""
    if database == "sqlite":
        return f"sqlite:///{folder / 'ledger.db'}"
    return stack.enter_context(postgresql(programs_or_skip()))


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        yield url_of(request.param, tmp_path, stack)


@pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
def test_queued_each_has_its_turn_in_the_order_of_coming_and_starts_from_the_one_before(url: str) -> None:
    turned_away, rollouts, serving = crowd(url, "queue")
    ended = check_one_at_a_time(rollouts)
    check_none_lost(turned_away, ended)
    assert not any(turned_away.values())
    assert list(rollouts) == in_line(), "first come, first served"
    assert [state.phase for state in ended] == [Phase.PROMOTED] * COUNT
    assert [state.stable for state in ended] == ["1", *(state.candidate for state in ended[:-1])]
    assert serving == ended[-1].candidate


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_superseded_the_newest_is_never_taken_back_for_an_older_one(url: str) -> None:
    turned_away, rollouts, serving = crowd(url, "supersede")
    ended = check_one_at_a_time(rollouts)
    check_none_lost(turned_away, ended)
    assert serving == str(COUNT + 1)
    assert ended[-1].candidate == serving
    for state in ended:
        assert state.phase in (Phase.PROMOTED, Phase.ROLLED_BACK, Phase.REFUSED)
        assert state.phase is Phase.PROMOTED or "superseded by" in state.reason


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_rejected_whoever_comes_while_one_is_under_way_is_told_so(url: str) -> None:
    turned_away, rollouts, serving = crowd(url, "reject")
    ended = check_one_at_a_time(rollouts)
    check_none_lost(turned_away, ended)
    assert ended
    assert {state.phase for state in ended} == {Phase.PROMOTED}
    assert serving == ended[-1].candidate
    assert all("on_conflict: reject" in why for why in turned_away.values() if why)
