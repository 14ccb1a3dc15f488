"""The node agent with a real Envoy and stand-in servers: who answers, what clients notice, what leases do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.agent_client import AgentError, AgentRefused, AgentRejected
from tests.serving.running_agent import RunningAgent, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, "--attempt-timeout-s", "0.5")
    try:
        yield running.start()
    finally:
        running.stop()


def test_a_route_decides_who_answers_and_the_answer_says_who_it_was(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", epoch=1)
    assert agent.ask_many(20) == {(200, "1"): 20}
    agent.route("1", "2", weight=50, epoch=2)
    seen = agent.ask_many(200)
    assert seen[200, "1"] + seen[200, "2"] == 200
    assert seen[200, "2"] > 50
    agent.route("2", epoch=3)
    assert agent.ask_many(20) == {(200, "2"): 20}


@pytest.mark.parametrize("behaviour", ["error", "hang", "die"])
def test_a_bad_candidate_costs_clients_nothing(agent: RunningAgent, behaviour: str) -> None:
    agent.deploy("1")
    agent.deploy("2", mode=behaviour)
    agent.route("1", "2", weight=50, epoch=1)
    assert agent.ask_many(30) == {(200, "1"): 30}


def test_the_three_protocols_reach_the_model_and_other_paths_say_what_is_served(agent: RunningAgent) -> None:
    agent.deploy("1", model="flights")
    agent.route("1", model="flights", epoch=1)
    for path in ("/v2/models/flights/infer", "/v2/models/flights", "/v1/models/flights:predict", "/invocations"):
        answer = agent.ask(path)
        assert (answer.status, answer.version) == (200, "1"), path
    agent.deploy("1", model="fares")
    agent.route("1", model="fares", epoch=1)
    assert agent.ask("/invocations").status == 404  # two models: which one?
    assert agent.ask("/invocations", x_lockgate_model="fares").status == 200
    nowhere = agent.ask("/v2/models/flight/infer")
    assert (nowhere.status, nowhere.body["error"]) == (
        404,
        "no model is served under this path; served here: fares, flights",
    )


def test_a_path_that_names_a_version_is_not_split(agent: RunningAgent) -> None:
    """Else a rollout would send it to a server that does not know that version."""
    agent.deploy("1")
    agent.deploy("2.0")
    agent.route("1", "2.0", weight=50, epoch=1)
    for version in ("1", "2.0"):
        assert agent.ask_many(15, f"/v2/models/m/versions/{version}/infer") == {(200, version): 15}
        assert agent.ask_many(15, f"/v1/models/m/versions/{version}:predict") == {(200, version): 15}
    assert agent.ask_many(15, "/v2/models/m/versions/2x0/infer") == {(200, "1"): 15}
    assert len(agent.ask_many(40, "/v2/models/m/infer")) == 2


def test_a_shadow_gets_copies_and_nobody_notices_what_it_does(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2", mode="hang")
    agent.route("1", "2", shadow=100, epoch=1)
    assert agent.ask_many(50) == {(200, "1"): 50}


def test_the_request_id_is_kept_or_made(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.route("1", epoch=1)
    own = agent.ask(x_request_id="order-77")
    assert own.body["id"] == own.headers["x-request-id"] == "order-77"
    made = agent.ask()
    assert made.body["id"] == made.headers["x-request-id"]
    assert len(made.body["id"]) == 36


def test_a_lease_that_nobody_renews_puts_all_traffic_back(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=7, lease_s=1.0)
    assert 0.0 < agent.client.renew("m", 7) <= 1.0
    lost = until(lambda: agent.client.status()["models"]["m"]["route"]["lease_lost"], "the lease is lost", 5.0)
    assert lost["epoch"] == 7
    assert agent.ask_many(50) == {(200, "1"): 50}
    assert "lease-lost" in [event["kind"] for event in agent.client.events()]
    with pytest.raises(AgentRefused, match="lost"):
        agent.client.renew("m", 7)
    with pytest.raises(AgentRefused, match="take a new epoch"):
        agent.route("1", "2", weight=50, epoch=7, lease_s=1.0)
    agent.route("1", "2", weight=50, epoch=8, lease_s=60.0)


def test_older_epochs_and_unready_versions_are_refused(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.route("1", epoch=5)
    agent.route("1", epoch=5)
    with pytest.raises(AgentRefused, match="older than the epoch 5") as refused:
        agent.route("1", epoch=4)
    assert refused.value.facts["epoch"] == 5
    path, digest = agent.model(mode="refuse")
    agent.client.deploy("m", "2", path, digest)
    until(lambda: agent.version("2")["state"] == "failed", "version 2 has failed")
    assert "these bytes are refused" in agent.version("2")["why"]
    with pytest.raises(AgentError, match="no ready replica") as for_now:
        agent.route("1", "2", weight=5, epoch=6)
    assert not isinstance(for_now.value, AgentRefused), "it may be tried again"
    with pytest.raises(AgentRefused, match="not deployed"):
        agent.route("1", "3", weight=5, epoch=6)


def test_deploying_is_idempotent_and_bound_to_the_bytes(agent: RunningAgent) -> None:
    digest = agent.deploy("1")
    path, other = agent.model()
    agent.client.deploy("m", "1", agent.home / "gone.onnx", digest)  # the bytes are kept here: no source is needed
    with pytest.raises(AgentRefused, match="deployed with the digest"):
        agent.client.deploy("m", "1", path, other)
    with pytest.raises(AgentRejected, match="not the bytes that were tested"):
        agent.client.deploy("m", "2", path, "0" * 64)
    with pytest.raises(AgentRejected, match="cannot read the model file"):
        agent.client.deploy("m", "2", path.with_name("none.onnx"), "1" * 64)


def test_a_version_in_the_route_stays_and_another_goes(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("2", epoch=1)
    with pytest.raises(AgentRefused, match="is in the route"):
        agent.client.undeploy("m", "2")
    agent.client.undeploy("m", "1")
    agent.client.undeploy("m", "1")
    assert list(agent.client.status()["models"]["m"]["versions"]) == ["2"]
    assert agent.ask_many(10) == {(200, "2"): 10}
