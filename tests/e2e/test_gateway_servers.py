"""Agent, Envoy and the real model server together: requests, counts, predictions and sampled rows fit each other."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from infra.samples_arrow import SampledRows
from infra.telemetry_envoy import EnvoyCounts
from serving.processes import LOG_BYTES_MAX
from tests.serving import models
from tests.serving.keys import body, sign
from tests.serving.running_agent import RunningAgent, until

pytestmark = pytest.mark.e2e

REQUESTS = 60


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, server=f"{sys.executable} -m serving.server")
    try:
        yield running.start()
    finally:
        running.stop()


def infer(agent: RunningAgent, number: int) -> list[str]:
    """The versions that answered, one row of four features each."""
    answered = []
    with closing(http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)) as connection:
        for index in range(number):
            row = {"name": "f", "shape": [1, 4], "datatype": "FP32", "data": [0.1 * (index % 7), 0.2, 0.3, 0.4]}
            connection.request("POST", "/v2/models/m/infer", json.dumps({"inputs": [row]}))
            answer = connection.getresponse()
            body = json.loads(answer.read())
            assert answer.status == 200, body
            answered.append(answer.headers["x-lockgate-version"])
    return answered


def test_shadow_and_stable_keep_the_same_rows_and_everything_is_counted(agent: RunningAgent) -> None:
    for version in ("1", "2"):
        path = agent.folder / f"{version}.onnx"
        digest = models.score(path)
        agent.client.deploy("m", version, path, digest)
        until(lambda version=version: agent.version(version)["state"] == "ready", "it is ready")
    agent.route("1", "2", shadow=100, epoch=1)
    assert infer(agent, REQUESTS) == ["1"] * REQUESTS

    telemetry = EnvoyCounts(agent.home)
    until(lambda: telemetry.counts("m", "2", "shadow").requests == REQUESTS, "all copies are counted")
    live, shadow = telemetry.counts("m", "1", "live"), telemetry.counts("m", "2", "shadow")
    assert (live.requests, live.errors, shadow.requests, shadow.errors) == (REQUESTS, 0, REQUESTS, 0)
    assert sum(live.scores) == sum(shadow.scores) == REQUESTS

    samples = SampledRows(agent.home)
    until(lambda: samples.read("m", "1", 0.0).num_rows == REQUESTS, "the stable version's rows are written", 10.0)
    until(lambda: samples.read("m", "2", 0.0).num_rows == REQUESTS, "the shadow's rows are written", 10.0)
    one, two = (samples.read("m", version, 0.0).sort_by("request_id") for version in ("1", "2"))
    for column in ("request_id", "row", "prediction", "in.f.0"):
        assert one[column].to_pylist() == two[column].to_pylist(), column


def test_going_back_needs_no_source(agent: RunningAgent) -> None:
    path = agent.folder / "1.onnx"
    digest = models.score(path)
    agent.client.deploy("m", "1", path, digest)
    until(lambda: agent.version("1")["state"] == "ready", "it is ready")
    agent.client.undeploy("m", "1")
    path.unlink()
    agent.client.deploy("m", "1", path, digest)
    until(lambda: agent.version("1")["state"] == "ready", "it is ready again")
    agent.route("1", epoch=1)
    assert infer(agent, 5) == ["1"] * 5


def test_a_version_that_is_not_signed_as_asked_does_not_start_and_says_so(agent: RunningAgent) -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    path = agent.folder / "m.onnx"
    digest = models.score(path)
    signature = sign(key, path.read_bytes())
    agent.client.deploy("m", "1", path, digest, signature=signature, signed_by=[body(other), body(key)])
    agent.client.deploy("m", "2", path, digest, signature=signature, signed_by=[body(other)])
    until(lambda: agent.version("1")["state"] == "ready", "the signed one is ready")
    until(lambda: agent.version("2")["state"] == "failed", "the other one is not")
    assert "will not be served: the signature is by none of the 1 keys" in agent.version("2")["why"]
    agent.client.deploy("m", "1", path, digest)  # as a stable version later: the same bytes, so the same version
    assert agent.version("1")["state"] == "ready"


def test_servers_are_forked_adopted_after_the_agent_s_death_and_end_with_a_clean_stop(agent: RunningAgent) -> None:
    for version in ("1", "2"):
        path = agent.folder / f"{version}.onnx"
        agent.client.deploy("m", version, path, models.score(path))
        until(lambda version=version: agent.version(version)["state"] == "ready", "it is ready")
    agent.route("1", "2", weight=50, epoch=1)
    before = [agent.version(version)["replicas"][0]["pid"] for version in ("1", "2")]
    parents = [int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in before]
    assert parents[0] == parents[1] != agent.client.status()["agent"]["pid"]
    agent.kill()
    agent.start()
    until(lambda: agent.version("2")["state"] == "ready", "version 2 is ready")
    assert [agent.version(version)["replicas"][0]["pid"] for version in ("1", "2")] == before
    logs = set((agent.home / "logs").glob("????????????.log"))
    for log in logs:
        with log.open("ab") as file:
            file.truncate(LOG_BYTES_MAX + 1)
    agent.kill_server("2")
    assert len(list((agent.home / "logs").glob("*.old.log"))) == 1, "a forked server's log is bounded, too"
    assert set(infer(agent, 40)) == {"1", "2"}
    assert agent.process is not None
    agent.process.terminate()
    assert agent.process.wait(30) == 0
    assert agent.children() == []


def test_on_a_full_disk_what_dies_comes_back_the_agent_too(agent: RunningAgent) -> None:
    path = agent.folder / "1.onnx"
    digest = models.score(path)
    agent.client.deploy("m", "1", path, digest)
    until(lambda: agent.version("1")["state"] == "ready", "it is ready")
    agent.route("1", epoch=1)
    for pid in agent.children():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file may grow
    gateway, killed = agent.client.status()["gateway"]["pid"], agent.version("1")["replicas"][0]["pid"]
    agent.kill()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # the agent inherits it, and its children from it
    try:
        agent.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert agent.client.status()["gateway"]["pid"] == gateway, "it serves on"
    assert agent.version("1")["replicas"][0]["pid"] == killed
    assert infer(agent, 5) == ["1"] * 5
    os.kill(gateway, signal.SIGKILL)
    agent.kill_server("1")

    def replaced() -> bool:
        found = agent.client.status()["gateway"]
        return bool(found["ready"] and found["pid"] != gateway)

    until(replaced, "the gateway is back")
    assert infer(agent, 5) == ["1"] * 5


def test_without_the_zygote_servers_start_all_the_same(agent: RunningAgent) -> None:
    path = agent.folder / "1.onnx"
    digest = models.score(path)
    agent.client.deploy("m", "1", path, digest)
    until(lambda: agent.version("1")["state"] == "ready", "it is ready")
    agent.kill_server("1")
    ended = [event["says"] for event in agent.client.events() if event["kind"] == "replica-ended"]
    assert ended[0].startswith("replica 0 of m version 1 was killed by SIGKILL"), "the zygote knows"
    [zygote] = [pid for pid in agent.children() if b"serving.zygote" in cmdline(pid) and is_zygote(agent, pid)]
    os.kill(zygote, signal.SIGKILL)
    agent.kill_server("1")
    agent.route("1", epoch=1)
    assert infer(agent, 5) == ["1"] * 5


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def is_zygote(agent: RunningAgent, pid: int) -> bool:
    """Whether it is the zygote itself, and not a server forked from it."""
    return pid not in [replica["pid"] for replica in agent.version("1")["replicas"]]
