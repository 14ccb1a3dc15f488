"""Whoever is in the canary stays in it while the weight grows, at every restart, and the share is what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.running_agent import RunningAgent

pytestmark = pytest.mark.e2e

USERS = 2000


def in_canary(agent: RunningAgent) -> set[str]:
    return {user for user, version in agent.ask_as(f"user-{number}" for number in range(USERS)) if version == "2"}


def test_the_canary_only_grows_with_its_weight_also_over_a_restart(tmp_path: Path) -> None:
    agent = RunningAgent(tmp_path)
    try:
        agent.start()
        agent.deploy("1")
        agent.deploy("2")
        before: set[str] = set()
        for epoch, weight in enumerate([1, 5, 25, 50, 100], start=1):
            agent.route("1", "2", weight=weight, epoch=epoch)
            now = in_canary(agent)
            assert before <= now
            # Five standard deviations of a binomial share of 2,000.
            assert abs(len(now) / USERS - weight / 100) <= 5 * (weight / 100 * (1 - weight / 100) / USERS) ** 0.5
            before = now
            if weight == 25:
                agent.kill()
                agent.start()
                assert in_canary(agent) == now
    finally:
        agent.stop()
