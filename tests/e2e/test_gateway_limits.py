"""What a sick server may cost others: replicas left out, floods bounded, waits ended; and servers that leave."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from infra.connection_unix import ask
from tests.serving.running_agent import RunningAgent, ask_on, until

pytestmark = pytest.mark.e2e

ATTEMPT_S = 3.0
REQUESTS_MAX = 8


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, "--attempt-timeout-s", str(ATTEMPT_S), "--requests-max", str(REQUESTS_MAX))
    try:
        yield running.start()
    finally:
        running.stop()


def answered_by(agent: RunningAgent, number: int) -> Counter[int | None]:
    """How many of so many requests each process answered; None: with an error."""
    with closing(http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)) as connection:
        return Counter(ask_on(connection, "/v2/models/m/infer", {}).body.get("pid") for _ in range(number))


def test_a_replica_that_only_errs_is_left_out_and_comes_back_when_it_is_well(agent: RunningAgent) -> None:
    """Its process lives and says that it is ready: only its answers show that it is not."""
    agent.deploy("1", replicas=2)
    agent.route("1", epoch=1)
    until(lambda: agent.version("1")["replicas"][1]["ready"], "both are ready")
    well, sick = agent.version("1")["replicas"]
    until(lambda: set(answered_by(agent, 20)) == {well["pid"], sick["pid"]}, "both answer")

    def asked() -> float:
        _, metrics = ask(sick["endpoint"], "GET", "/metrics", 5.0)
        return float(metrics.split()[-1])

    os.kill(sick["pid"], signal.SIGUSR1)
    answered_by(agent, 60)  # until it is seen: a first and a second attempt may both have met it
    before, seen = asked(), answered_by(agent, 400)
    assert asked() - before <= 60, "about half of them, were it not left out; some, whenever it is tried again"
    assert seen[well["pid"]] >= 380
    os.kill(sick["pid"], signal.SIGUSR2)
    until(lambda: sick["pid"] in answered_by(agent, 20), "it answers again", 40.0)


def test_a_flood_on_a_stuck_model_is_refused_at_once_and_others_do_not_notice(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("1", model="stuck", mode="hang")
    agent.route("1", epoch=1)
    agent.route("1", model="stuck", epoch=1)

    def flood(_: int) -> tuple[int, float]:
        start = time.monotonic()
        return agent.ask("/v2/models/stuck/infer").status, time.monotonic() - start

    with ThreadPoolExecutor(60) as clients:
        floods = [clients.submit(flood, at) for at in range(60)]
        until(lambda: sum(each.done() for each in floods) >= 30, "most are refused while the others wait", ATTEMPT_S)
        start = time.monotonic()
        assert agent.ask_many(50) == {(200, "1"): 50}
        assert time.monotonic() - start < ATTEMPT_S
        answers = [each.result() for each in floods]
    refused = [took for status, took in answers if status == 503]
    assert len(refused) >= 60 - 4 * REQUESTS_MAX
    assert sorted(refused)[len(refused) // 2] < ATTEMPT_S / 2
    assert {status for status, _ in answers} == {503, 504}


def test_a_route_s_own_time_out_ends_every_wait_and_leaves_time_for_the_stable_version(agent: RunningAgent) -> None:
    for version, mode in (("1", "ok"), ("2", "hang")):
        agent.deploy(version, mode=mode)
        agent.deploy(version, model="patient", mode="slow" if mode == "ok" else mode, slow_s=1.5)
    agent.route("1", "2", weight=50, epoch=1, timeout_s=1.0)
    start = time.monotonic()
    assert agent.ask_many(12) == {(200, "1"): 12}
    waited = time.monotonic() - start
    assert agent.ask().body["wait_ms"] == "500", "the server is told, so that it runs nothing that nobody waits for"
    assert agent.ask(x_request_timeout_ms="300").body["wait_ms"] == "300"
    agent.route("2", epoch=2, timeout_s=1.0)
    start = time.monotonic()
    assert agent.ask().status == 504
    assert 0.4 < time.monotonic() - start < ATTEMPT_S, "not the gateway's own time-out"
    assert waited < 12 * ATTEMPT_S / 2
    agent.route("1", model="patient", epoch=1)
    assert agent.ask("/v2/models/patient/infer").status == 200, "another model's requests may take longer"


def test_a_version_that_leaves_finishes_what_it_has_begun(agent: RunningAgent) -> None:
    """Every request takes 0.2 s, and none is asked a second time."""
    for version in ("1", "2"):
        agent.deploy(version, mode="slow", slow_s=0.2)
    agent.route("1", epoch=1)
    seen: Counter[tuple[int, str]] = Counter()
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answer = agent.ask()
            seen[answer.status, answer.version] += 1

    clients = [threading.Thread(target=client) for _ in range(6)]
    for each in clients:
        each.start()
    try:
        for epoch in range(2, 8):
            until(lambda: seen, "requests are answered")
            goes, comes = ("1", "2") if epoch % 2 == 0 else ("2", "1")
            agent.route(comes, epoch=epoch)
            agent.client.undeploy("m", goes)
            agent.deploy(goes, mode="slow", slow_s=0.2)
    finally:
        stop.set()
        for each in clients:
            each.join(30)
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {"1", "2"}
