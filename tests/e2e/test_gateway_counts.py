"""What the gateway counts, for every way in which a version can fail, live and as a shadow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.telemetry_envoy import EnvoyCounts
from policies.evidence import LATENCY_EDGES_MS, SCORE_EDGES, Counts
from tasks.ports import PortError
from tests.serving.running_agent import RunningAgent, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, "--attempt-timeout-s", "0.3")
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture
def telemetry(agent: RunningAgent) -> EnvoyCounts:
    return EnvoyCounts(agent.home)


def settled(telemetry: EnvoyCounts, version: str, role: str, requests: int) -> Counts:
    """The counts once all requests are in them, histogram included."""
    counts = Counts(0, 0)

    def complete() -> bool:
        nonlocal counts
        counts = telemetry.counts("m", version, role)  # type: ignore[arg-type]
        return counts.requests >= requests

    until(complete, f"{requests} requests are counted", 5.0)
    return counts


@pytest.mark.parametrize("behaviour", ["error", "hang", "die"])
def test_every_failure_counts_once_against_the_version_that_failed(
    agent: RunningAgent, telemetry: EnvoyCounts, behaviour: str
) -> None:
    agent.deploy("1")
    agent.deploy("2", mode=behaviour)
    agent.route("1", "2", weight=50, epoch=1)
    assert agent.ask_many(40, keys=True) == {(200, "1"): 40}
    stable, candidate = telemetry.counts("m", "1"), telemetry.counts("m", "2")
    assert stable.requests + candidate.requests == 40
    assert candidate.requests > 8
    assert candidate.errors == candidate.requests
    assert stable.errors == 0


@pytest.mark.parametrize("behaviour", ["error", "hang", "die"])
def test_a_shadow_s_failures_count_as_the_shadow_s_and_nowhere_else(
    agent: RunningAgent, telemetry: EnvoyCounts, behaviour: str
) -> None:
    agent.deploy("1")
    agent.deploy("2", mode=behaviour)
    agent.route("1", "2", shadow=100, epoch=1)
    assert agent.ask_many(30) == {(200, "1"): 30}
    shadow = settled(telemetry, "2", "shadow", 30)
    assert (shadow.requests, shadow.errors) == (30, 30)
    assert telemetry.counts("m", "2", "live").requests == 0
    live = telemetry.counts("m", "1", "live")
    assert (live.requests, live.errors) == (30, 0)


def test_a_route_s_own_time_out_holds_for_second_attempts_and_for_copies_too(
    agent: RunningAgent, telemetry: EnvoyCounts
) -> None:
    """Both versions take longer than the gateway's own time-out; the route gives them time enough."""
    agent.deploy("1", mode="slow", slow_s=0.8)
    agent.deploy("2", mode="slow", slow_s=0.8)
    agent.deploy("3", mode="error")
    agent.route("1", "2", shadow=100, epoch=1, timeout_s=10.0)
    assert agent.ask_many(3) == {(200, "1"): 3}
    shadow = settled(telemetry, "2", "shadow", 3)
    assert (shadow.requests, shadow.errors) == (3, 0)
    agent.route("1", "3", weight=99, epoch=2, timeout_s=10.0)
    assert agent.ask_many(3, keys=True) == {(200, "1"): 3}


def test_with_all_traffic_on_the_candidate_the_copies_go_to_the_stable_version(
    agent: RunningAgent, telemetry: EnvoyCounts
) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=100, shadow=100, epoch=1)
    assert agent.ask_many(30) == {(200, "2"): 30}
    assert telemetry.counts("m", "2", "live").requests == 30
    assert settled(telemetry, "1", "shadow", 30).requests == 30
    assert telemetry.counts("m", "1", "live").requests == 0


def test_latency_is_what_clients_wait_for(agent: RunningAgent, telemetry: EnvoyCounts) -> None:
    agent.deploy("1", mode="slow", slow_s=0.05)
    agent.route("1", epoch=1)
    agent.ask_many(20)
    until(lambda: sum(telemetry.counts("m", "1").latency) == 20, "the histogram is complete", 5.0)
    latency = telemetry.counts("m", "1").latency
    assert len(latency) == len(LATENCY_EDGES_MS) + 1
    slower_than_45_ms = sum(count for edge, count in zip(LATENCY_EDGES_MS, latency, strict=False) if edge > 45)
    assert slower_than_45_ms == 20


def test_predictions_of_a_process_that_ended_are_kept(agent: RunningAgent, telemetry: EnvoyCounts) -> None:
    agent.deploy("1")
    agent.route("1", epoch=1)
    agent.ask_many(20)
    before = telemetry.counts("m", "1").scores
    assert len(before) == len(SCORE_EDGES) + 1
    assert sum(before) == 20
    agent.kill_server("1")
    agent.ask_many(5)
    assert sum(telemetry.counts("m", "1").scores) == 25


def test_without_the_agent_there_are_no_counts_and_the_error_says_so(agent: RunningAgent) -> None:
    telemetry = EnvoyCounts(agent.folder / "elsewhere")
    with pytest.raises(PortError, match="no agent has been started"):
        telemetry.counts("m", "1")
