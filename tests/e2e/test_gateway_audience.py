"""Who always or never meets the candidate, on a real Envoy: whatever the weight, apart from what is compared, for all
three protocols; and users who are known by a cookie stay where they are, at every gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.telemetry_envoy import EnvoyCounts
from policies.traffic import Key, Rule
from tests.serving.running_agent import Answer, RunningAgent, until

pytestmark = pytest.mark.e2e

TENANT = Key("header", "x-tenant")
RULES = (
    Rule(TENANT, ("bank", "court"), "stable"),
    Rule(Key("cookie", "session"), ("ann",), "candidate"),
    Rule(TENANT, ("labs",), "candidate"),
)
PATHS = ("/v2/models/m/infer", "/v1/models/m:predict", "/invocations")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, "--attempt-timeout-s", "0.5")
    try:
        running.start()
        running.deploy("1")
        running.deploy("2")
        yield running
    finally:
        running.stop()


def versions(agent: RunningAgent, **headers: str) -> set[str]:
    return {agent.ask(path, **headers).version for path in PATHS for _ in range(3)}


def test_rules_decide_whatever_the_weight_and_never_wins(agent: RunningAgent) -> None:
    for epoch, weight in ((1, 99), (2, 1)):
        agent.route("1", "2", weight=weight, epoch=epoch, rules=RULES)
        assert versions(agent, x_tenant="bank") == versions(agent, x_tenant="court") == {"1"}
        assert versions(agent, x_tenant="labs") == {"2"}
        assert versions(agent, cookie="theme=dark; session=ann; lang=en") == {"2"}
        assert versions(agent, cookie="session=ann", x_tenant="bank") == {"1"}
        assert agent.ask("/v2/models/m/versions/2/infer", x_tenant="bank").version == "1"
    for nearly in ("session=anna", "xsession=ann", "session=ann=x"):  # at 1 %, ten draws are not all in the canary
        assert "1" in {agent.ask(cookie=nearly).version for _ in range(10)}, nearly


def test_until_the_rollout_has_ended_never_means_never(agent: RunningAgent) -> None:
    """Not as copies while the candidate is a shadow, and not while it is only watched."""
    telemetry = EnvoyCounts(agent.home)
    agent.route("1", "2", shadow=100, epoch=1, rules=RULES)
    assert versions(agent, x_tenant="bank") == versions(agent, x_tenant="labs") == {"1"}
    until(lambda: telemetry.counts("m", "2", "shadow").requests == 9, "the others' requests are copied")
    agent.route("1", "2", weight=100, shadow=50, epoch=2, rules=RULES)
    assert versions(agent, x_tenant="bank") == {"1"}
    assert versions(agent) == {"2"}
    agent.route("2", epoch=3)
    assert versions(agent, x_tenant="bank") == {"2"}
    assert telemetry.counts("m", "2", "shadow").requests == 9


def test_what_is_ruled_or_names_a_version_is_rescued_too_and_not_compared(agent: RunningAgent) -> None:
    telemetry = EnvoyCounts(agent.home)
    agent.deploy("3", mode="error")
    agent.route("1", "3", weight=50, epoch=1, rules=RULES)
    for _ in range(20):
        answers = [
            agent.ask(x_tenant="labs"),
            agent.ask(x_tenant="bank"),
            agent.ask("/v2/models/m/versions/3/infer"),
            agent.ask("/v2/models/m/versions/1/infer"),
        ]
        assert [(answer.status, answer.version) for answer in answers] == [(200, "1")] * 4
        assert answers[1].body["apart"] == "true"
    assert telemetry.counts("m", "1").requests == telemetry.counts("m", "3").requests == 0
    forged = agent.ask(x_lockgate_apart="true")
    assert forged.body["apart"] is None
    assert telemetry.counts("m", "1").requests + telemetry.counts("m", "3").requests == 1


def canary_of(agent: RunningAgent, users: int = 300) -> set[int]:
    def asked(user: int) -> Answer:
        return agent.ask(cookie=f"session=user-{user}")

    return {user for user in range(users) if asked(user).version == "2"}


def test_users_known_by_a_cookie_stay_in_the_canary_as_it_grows_at_every_gateway(
    agent: RunningAgent, tmp_path: Path
) -> None:
    key = Key("cookie", "session")
    other = RunningAgent(tmp_path / "other")
    other.folder.mkdir()
    try:
        other.start()
        for version in ("1", "2"):
            other.deploy(version)
        agent.route("1", "2", weight=5, epoch=1, key=key)
        few = canary_of(agent)
        for one in (agent, other):
            one.route("1", "2", weight=40, epoch=2, key=key)
        more = canary_of(agent)
        assert few < more
        assert 80 < len(more) < 160  # five standard deviations around 120
        assert canary_of(other) == more
        agent.kill()
        agent.start()
        assert canary_of(agent) == more
    finally:
        other.stop()
