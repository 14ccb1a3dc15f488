"""Deaths under live load: of the agent, of Envoy, of servers. No client notices where a healthy copy exists."""

from __future__ import annotations

import http.client
import os
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.agent_client import AgentAbsent, AgentError
from tests.serving.running_agent import RunningAgent, ask_on, gone, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, "--attempt-timeout-s", "1.0")
    try:
        yield running.start()
    finally:
        running.stop()


@contextmanager
def load(agent: RunningAgent, clients: int = 4) -> Iterator[Counter[object]]:
    """Clients that ask without pause until the block ends; counts answers by status and failures by exception."""
    seen: Counter[object] = Counter()
    stop = threading.Event()

    def client() -> None:
        own: Counter[object] = Counter()
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)
        while not stop.is_set():
            try:
                own[ask_on(connection, "/v2/models/m/infer", {}).status] += 1
            except (OSError, http.client.HTTPException) as exc:
                own[repr(exc)] += 1
                connection.close()
        connection.close()
        seen.update(own)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def only_successes(seen: Counter[object]) -> bool:
    return set(seen) == {200}


def test_killing_the_candidate_s_server_again_and_again_costs_no_request(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=1)
    with load(agent) as seen:
        for _ in range(5):
            agent.kill_server("2")
            time.sleep(0.1)
    assert only_successes(seen), seen
    assert seen[200] > 500


def test_a_candidate_that_is_stopped_in_its_tracks_costs_no_request(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=1)
    pid = agent.version("2")["replicas"][0]["pid"]
    with load(agent) as seen:
        time.sleep(0.2)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(2.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.2)
    assert only_successes(seen), seen


def test_weights_promotion_and_rollback_change_under_load_without_a_failed_request(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", epoch=1)
    epoch = 1
    with load(agent) as seen:
        for _ in range(4):
            for stable, candidate, weight, shadow in [
                ("1", "2", 0, 100),
                ("1", "2", 5, 0),
                ("1", "2", 50, 0),
                ("1", "2", 100, 50),
                ("2", None, 0, 0),
                ("2", "1", 50, 0),
                ("1", None, 0, 0),
            ]:
                epoch += 1
                agent.route(stable, candidate, weight=weight, shadow=shadow, epoch=epoch)
                time.sleep(0.03)
    assert only_successes(seen), seen
    assert seen[200] > 500


def test_versions_come_and_go_under_load_without_a_failed_request(agent: RunningAgent) -> None:
    agent.deploy("0")
    agent.route("0", epoch=1)
    with load(agent) as seen:
        for number in range(1, 5):
            agent.deploy(str(number))
            agent.route(str(number - 1), str(number), weight=50, epoch=2 * number)
            agent.route(str(number), epoch=2 * number + 1)
            agent.client.undeploy("m", str(number - 1))
    assert only_successes(seen), seen


def test_the_agent_killed_leaves_everything_serving_and_takes_it_over_again(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2", replicas=2)
    agent.route("1", "2", weight=50, epoch=3, lease_s=60.0)
    before = agent.client.status()
    with load(agent) as seen:
        agent.kill()
        with pytest.raises(AgentAbsent):
            agent.client.status()
        time.sleep(0.2)
        agent.start()
        until(lambda: agent.version("2")["state"] == "ready", "version 2 is ready")
        agent.route("1", "2", weight=60, epoch=4, lease_s=60.0)
    assert only_successes(seen), seen
    after = agent.client.status()
    assert after["gateway"]["pid"] == before["gateway"]["pid"]
    for version in ("1", "2"):
        pids = [
            [replica["pid"] for replica in status["models"]["m"]["versions"][version]["replicas"]]
            for status in (before, after)
        ]
        assert pids[0] == pids[1]
    assert after["models"]["m"]["route"]["weight"] == 60
    agent.kill_server("2")  # an adopted server is restarted as any other


def test_a_lease_is_not_extended_by_the_agent_s_death(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=3, lease_s=1.0)
    agent.kill()
    time.sleep(1.2)
    agent.start()
    assert agent.client.status()["models"]["m"]["route"]["lease_lost"]["epoch"] == 3
    assert agent.ask_many(40) == {(200, "1"): 40}


def test_servers_that_died_with_the_agent_are_started_anew(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.route("1", epoch=1)
    old = agent.client.status()
    agent.kill()
    for pid in (old["gateway"]["pid"], old["models"]["m"]["versions"]["1"]["replicas"][0]["pid"]):
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: gone(pid), "it is gone")
    agent.start()
    until(lambda: agent.version("1")["state"] == "ready", "version 1 is ready")
    assert agent.ask_many(10) == {(200, "1"): 10}


def test_envoy_killed_comes_back_with_the_same_routes(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.route("1", epoch=1)
    pid = agent.client.status()["gateway"]["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: agent.client.status()["gateway"]["pid"] not in (None, pid), "another Envoy runs")
    until(lambda: agent.client.status()["gateway"]["ready"], "it is ready")
    assert agent.ask_many(10) == {(200, "1"): 10}
    agent.route("1", epoch=2)


def test_a_clean_stop_ends_everything_and_a_start_brings_it_back(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.route("1", epoch=1)
    assert agent.process is not None
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(20) == 0
    assert agent.children() == []
    agent.start()
    until(lambda: agent.version("1")["state"] == "ready", "version 1 is ready")
    assert agent.ask_many(10) == {(200, "1"): 10}


def test_a_second_agent_on_the_same_home_is_refused(agent: RunningAgent) -> None:
    second = subprocess.run(agent.command(), capture_output=True, text=True, timeout=20)
    assert second.returncode == 2
    assert "another agent" in second.stderr
    assert "Traceback" not in second.stderr
    assert agent.client.status()["gateway"]["ready"]


def test_a_busy_gateway_port_is_one_clear_error(agent: RunningAgent, tmp_path: Path) -> None:
    other = RunningAgent(tmp_path / "other", port=agent.port)
    other.folder.mkdir()
    refused = subprocess.run(other.command(), capture_output=True, text=True, timeout=20)
    assert refused.returncode == 2
    assert f"cannot listen on 127.0.0.1:{agent.port}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert other.children() == []


def test_a_disk_that_takes_no_more_gives_no_share_and_cannot_keep_one(agent: RunningAgent) -> None:
    """Refused: a larger share. Carried out all the same: going back, and the end of a lease."""
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=1, lease_s=2.0)
    assert agent.process is not None
    limits = resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may grow
    with pytest.raises(AgentError, match="could not write"):
        agent.route("1", "2", weight=60, epoch=2, lease_s=2.0)
    with load(agent) as seen:
        until(lambda: "lease-lost" in [event["kind"] for event in agent.client.events()], "the lease is lost", 6.0)
        until(lambda: agent.version("2")["state"] == "stopping", "version 2 is stopped", 6.0)
        time.sleep(0.2)
        assert agent.ask_many(50) == {(200, "1"): 50}
        resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, limits)
        until(lambda: agent.version("2")["state"] == "ready", "version 2 runs again, without a share")
        assert agent.ask_many(50) == {(200, "1"): 50}
    assert only_successes(seen), seen


def may_write(agent: RunningAgent, room: int | None) -> None:
    """How many bytes a file may have by the agent; None: as many as before."""
    assert agent.process is not None
    hard = resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, (hard if room is None else room, hard))


@pytest.mark.parametrize("room", [0, 8192], ids=["nothing can be written", "the state can, the routes cannot"])
def test_an_agent_that_comes_back_to_a_full_disk_leaves_the_gateway_in_service(agent: RunningAgent, room: int) -> None:
    """What was to change meanwhile, the end of a lease, holds all the same."""
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=1, lease_s=3.0)
    before = agent.client.status()["gateway"]["pid"]
    with load(agent) as seen:
        if room:
            may_write(agent, room)
            until(lambda: agent.version("2")["state"] == "stopping", "version 2 is stopped")
            until(lambda: '"lost": {' in (agent.home / "state.json").read_text(), "that is on disk")
            agent.kill()
        else:
            agent.kill()
            time.sleep(3.2)
        agent.start(room)
        until(lambda: agent.version("2")["state"] == "stopping", "version 2 is stopped")
        time.sleep(0.2)
        assert agent.ask_many(50) == {(200, "1"): 50}
        assert "gateway-behind" in [event["kind"] for event in agent.client.events()]
        may_write(agent, None)
        until(lambda: agent.version("2")["state"] == "ready", "version 2 runs again, without a share")
        assert agent.ask_many(50) == {(200, "1"): 50}
    assert agent.client.status()["gateway"]["pid"] == before
    assert only_successes(seen), seen


def test_a_gateway_that_died_on_a_full_disk_is_started_with_the_routes_of_before(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", "2", weight=50, epoch=1, lease_s=1.0)
    pid = agent.client.status()["gateway"]["pid"]
    agent.kill()
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid), "it is gone")
    time.sleep(1.2)
    agent.start(room=0)
    until(lambda: agent.version("2")["state"] == "stopping", "version 2 is stopped")
    until(lambda: agent.version("1")["state"] == "ready", "version 1 is ready")
    assert agent.ask_many(50) == {(200, "1"): 50}


def test_who_answers_everything_is_not_stopped_for_a_gateway_that_cannot_be_told(agent: RunningAgent) -> None:
    """The new stable version is ready, and the gateway does not know it."""
    agent.deploy("1")
    agent.deploy("2")
    agent.route("1", epoch=1)
    may_write(agent, 0)
    with load(agent) as seen:
        with pytest.raises(AgentError, match="could not write"):
            agent.route("2", epoch=2)
        time.sleep(1.0)
        assert agent.version("1")["state"] == "ready"
        may_write(agent, None)
        until(lambda: agent.ask_many(20) == {(200, "2"): 20}, "the gateway knows")
    assert only_successes(seen), seen


def test_an_envoy_that_cannot_be_asked_any_more_is_replaced_when_the_agent_starts(agent: RunningAgent) -> None:
    agent.deploy("1")
    agent.route("1", epoch=1)
    pid = agent.client.status()["gateway"]["pid"]
    agent.kill()
    (agent.home / "envoy" / "admin.sock").unlink()
    agent.start()
    assert gone(pid)
    assert agent.ask_many(5) == {(200, "1"): 5}


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[RunningAgent]:
    """Waits longer for an attempt than a server needs to be back."""
    running = RunningAgent(tmp_path, "--attempt-timeout-s", "10")
    try:
        yield running.start()
    finally:
        running.stop()


def test_killing_the_only_server_again_and_again_costs_no_request(patient: RunningAgent) -> None:
    """Nobody else could answer: what it was killed with is asked again once it is back."""
    patient.deploy("1")
    patient.route("1", epoch=1)
    with load(patient) as seen:
        for _ in range(3):
            patient.kill_server("1")
            # What died with three servers is sent no fourth time; attempts wait for 0.25 s at most at a time.
            time.sleep(1.0)
    assert only_successes(seen), seen
    assert seen[200] > 50


def test_killing_the_only_server_that_makes_no_errors_costs_no_request(patient: RunningAgent) -> None:
    """What the candidate has failed at is under way on the stable version when that dies: it is asked once more."""
    patient.deploy("1", mode="slow", slow_s=0.1)
    patient.deploy("2", mode="error")
    patient.route("1", "2", weight=50, epoch=1)
    with load(patient, clients=8) as seen:
        for _ in range(3):
            time.sleep(0.3)
            patient.kill_server("1")
            time.sleep(1.0)
    assert only_successes(seen), seen
    assert seen[200] > 50


def test_a_request_that_servers_die_of_is_sent_three_times_at_most(patient: RunningAgent) -> None:
    """Twice, where a server needs longer for its next start than an attempt waits."""
    patient.deploy("1", mode="die")
    patient.route("1", epoch=1)
    answer = patient.ask()
    assert answer.status == 503
    assert not [name for name in answer.headers if name in ("x-lockgate-died", "x-lockgate-again")]
    until(lambda: patient.version("1")["state"] == "ready", "it is back")
    assert [event["kind"] for event in patient.client.events()].count("replica-ended") in (2, 3)
