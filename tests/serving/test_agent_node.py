"""How a change of traffic comes to be in force and on disk: the agent's node with a gateway that only takes notes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from policies.evidence import LATENCY_EDGES_MS
from policies.traffic import TIMEOUT_S_MAX, Route
from serving import durable, gateway, node, supervisor
from serving.agent_errors import Conflict, NotDurable
from serving.batching import Limits
from serving.durable import put_in_place
from serving.launcher import SERVER, Launcher
from serving.supervisor import DRAIN_S, Places, Replica, VersionRunner, VersionSpec
from tests.serving import models

PATH = "/v2/models/m"


class NotingEnvoy:
    """Takes on whatever it is told, at once."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self.weights: list[int] = []

    async def put(self, kind: str, resources: list[dict[str, Any]]) -> None:
        if kind == "routes":
            entries = resources[0]["virtual_hosts"][0]["routes"]
            split = next(entry["route"] for entry in entries if entry["match"].get("path_separated_prefix") == PATH)
            shares = {one["name"]: one["weight"] for one in split["weighted_clusters"]["clusters"]}
            self.weights.append(shares.get(gateway.arm_name("m", "2", "1"), 0))
            self.told.set()


@pytest.fixture
def envoy() -> NotingEnvoy:
    return NotingEnvoy()


@pytest.fixture
def agent(tmp_path: Path, envoy: NotingEnvoy) -> node.Agent:
    """Two versions that are ready, and no process."""
    made = node.Agent(node.AgentSettings(tmp_path, gateway.GatewaySettings()))
    made._envoy = envoy  # type: ignore[assignment]
    for version in ("1", "2"):
        replica = SimpleNamespace(endpoint=f"unix:{version}.sock", ready=True, log=tmp_path / f"{version}.log")
        spec = VersionSpec("m", version, "0" * 64)
        (samples := tmp_path / "samples" / "m" / version).mkdir(parents=True)
        made._runners["m", version] = SimpleNamespace(  # type: ignore[assignment]
            spec=spec, replicas=[replica], ready=1, suspended=False, samples=samples, stop=lambda: asyncio.sleep(0)
        )
    return made


def canary(weight: int, epoch: int) -> Route:
    return Route("m", "1", "2", weight=weight, epoch=epoch)


def on_disk(agent: node.Agent) -> Any:
    return json.loads((agent.home / "state.json").read_bytes())["routes"][0]["route"]["weight"]


def test_the_gateway_does_not_wait_for_the_disk_but_the_answer_does(
    agent: node.Agent, envoy: NotingEnvoy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(aside: Path, path: Path) -> None:
        assert envoy.told.wait(10), "the disk was waited for first"
        put_in_place(aside, path)

    monkeypatch.setattr(durable, "put_in_place", slow)
    asyncio.run(agent.set_route(canary(10, epoch=1)))
    assert envoy.weights == [10]
    assert on_disk(agent) == 10


def test_a_lease_that_is_over_ends_the_share_before_the_disk_is_waited_for(
    agent: node.Agent, envoy: NotingEnvoy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(aside: Path, path: Path) -> None:
        assert 0 in envoy.weights, "the disk was waited for first"
        put_in_place(aside, path)

    async def lapse() -> None:
        await agent.set_route(replace(canary(10, epoch=1), lease_s=0.2))
        monkeypatch.setattr(durable, "put_in_place", slow)
        keeping = asyncio.create_task(agent._keep_leases())
        async with asyncio.timeout(20):
            while agent._held["m"].lost is None or on_disk(agent):  # noqa: ASYNC110 - nobody is told when it is on disk
                await asyncio.sleep(0.05)
        keeping.cancel()

    asyncio.run(lapse())
    assert envoy.weights == [10, 0]


def test_a_route_that_was_refused_after_it_had_its_name_on_disk_is_not_found_there(
    agent: node.Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamed_and_not_synced(aside: Path, path: Path) -> None:
        put_in_place(aside, path)
        raise NotDurable("input/output error")

    async def grow() -> None:
        await agent.set_route(canary(10, epoch=1))
        monkeypatch.setattr(durable, "put_in_place", renamed_and_not_synced)
        with pytest.raises(NotDurable):
            await agent.set_route(canary(20, epoch=2))

    asyncio.run(grow())
    assert on_disk(agent) == 10


def test_a_disk_that_fails_late_takes_a_larger_share_back(
    agent: node.Agent, envoy: NotingEnvoy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(aside: Path, path: Path) -> None:
        raise NotDurable("input/output error")

    async def grow_then_shrink() -> None:
        await agent.set_route(canary(10, epoch=1))
        monkeypatch.setattr(durable, "put_in_place", failing)
        with pytest.raises(NotDurable):
            await agent.set_route(canary(20, epoch=2))
        await agent.set_route(Route("m", "1", epoch=3))

    asyncio.run(grow_then_shrink())
    assert envoy.weights == [10, 20, 10, 0]
    assert on_disk(agent) == 10
    assert [event["kind"] for event in agent.events(0)] == ["not-durable"]


class StuckDisk:
    """Syncs nothing until it is released, and fails then if it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting, self.released, self.fails = threading.Event(), threading.Event(), False
        monkeypatch.setattr(durable, "put_in_place", self._put)

    def _put(self, aside: Path, path: Path) -> None:
        self.waiting.set()
        assert self.released.wait(20)
        if self.fails:
            self.fails = False
            aside.unlink()
            raise NotDurable("input/output error")
        put_in_place(aside, path)


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_while_a_disk_is_stuck_shares_are_taken_back_by_order_and_by_lease(
    agent: node.Agent, envoy: NotingEnvoy, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    for version in ("1", "2"):
        agent._runners["other", version] = agent._runners["m", version]

    async def stuck() -> list[Any]:
        await agent.set_route(canary(10, epoch=1))
        await agent.set_route(Route("other", "1", "2", weight=50, epoch=1, lease_s=0.5))
        disk = StuckDisk(monkeypatch)
        disk.fails = fails
        grows = asyncio.create_task(agent.set_route(canary(20, epoch=2)))
        again = asyncio.create_task(agent.set_route(canary(20, epoch=2)))
        await until(disk.waiting.is_set)
        renewed = await agent.renew("m", 2)
        assert renewed is None  # a route without a lease; the disk is not waited for
        keeping = asyncio.create_task(agent._keep_leases())
        await until(lambda: agent._held["other"].lost is not None)  # another model's lease
        back = asyncio.create_task(agent.set_route(Route("m", "1", epoch=3)))
        await until(lambda: envoy.weights[-1] == 0)
        disk.released.set()
        ended = await asyncio.gather(grows, back, again, return_exceptions=True)
        keeping.cancel()
        await until(lambda: agent._saving is None or agent._saving.done())
        return ended

    grew, back, again = asyncio.run(stuck())
    assert isinstance(grew, NotDurable) is fails
    assert grew is None or fails
    assert back is None
    assert isinstance(again, Conflict)  # epoch 3 stands now
    assert envoy.weights[-1] == 0
    assert agent._held["m"].route == Route("m", "1", epoch=3)
    state = json.loads((agent.home / "state.json").read_bytes())
    assert [entry["route"]["weight"] for entry in state["routes"]] == [0, 0]
    assert not [path.name for path in agent.home.iterdir() if path.name.startswith(".state")]


def test_an_older_content_that_comes_late_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    async def late() -> None:
        file = durable.StateFile(tmp_path / "state.json")
        older, newer = file.aside(b"older"), file.aside(b"newer")
        await file.put(newer)
        await file.put(older)

    asyncio.run(late())
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert (tmp_path / "state.json").read_bytes() == b"newer"


def test_a_version_that_is_asked_for_while_it_leaves_begins_once_it_has_left(
    agent: node.Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the sockets of the one before it, which takes them away when it ends."""
    order, copied = [], threading.Event()

    async def stop() -> None:
        await asyncio.sleep(0.2)
        order.append("left")

    def new(spec: VersionSpec) -> Any:
        made = SimpleNamespace(spec=spec, replicas=[], samples=Path("none"), begin=lambda _: order.append("began"))
        agent._runners[spec.model, spec.version] = made  # type: ignore[assignment]
        return made

    monkeypatch.setattr(agent._runners["m", "2"], "stop", stop)
    monkeypatch.setattr(agent, "_new_runner", new)
    monkeypatch.setattr(agent._store, "add", lambda *_: copied.wait(10.0))

    async def go() -> None:
        await agent.set_route(Route("m", "1", epoch=1))
        again = asyncio.create_task(agent.deploy(VersionSpec("m", "2", "1" * 64), Path("m.onnx")))
        leaving = asyncio.create_task(agent.undeploy("m", "2"))
        async with asyncio.timeout(10.0):
            while not agent._leaving:  # noqa: ASYNC110 - bounded
                await asyncio.sleep(0.01)
        copied.set()
        await asyncio.gather(again, leaving)

    asyncio.run(go())
    assert order == ["left", "began"]


@pytest.mark.parametrize(("how", "grace_s"), [("suspend", 0.0), ("stop", DRAIN_S)])
def test_a_version_that_is_suspended_is_not_drained(tmp_path: Path, how: str, grace_s: float) -> None:
    """Its lease is over, the gateway cannot be told, and the other models' leases wait for this one's end."""
    places, graces = Places(tmp_path, tmp_path, tmp_path, tmp_path / "m.onnx"), []

    async def stop(after_s: float) -> None:
        graces.append(after_s)

    async def go() -> None:
        runner = VersionRunner(VersionSpec("m", "2", "0" * 64), places, Launcher(tmp_path), lambda *_, **__: None)
        runner.replicas[0].process = SimpleNamespace(stop=stop)  # type: ignore[assignment]
        await getattr(runner, how)()

    asyncio.run(go())
    assert graces == [grace_s]


def test_a_disk_that_has_no_room_for_samples_does_not_keep_a_version_from_beginning(tmp_path: Path) -> None:
    """It was on the record as deployed, and nobody would have started it."""
    (tmp_path / "samples").write_text("no room for a folder")
    places, begun = Places(tmp_path, tmp_path, tmp_path / "samples" / "m" / "1", tmp_path / "m.onnx"), []
    runner = VersionRunner(VersionSpec("m", "1", "0" * 64), places, Launcher(tmp_path), lambda *_, **__: None)
    runner.replicas[0].begin = begun.append  # type: ignore[method-assign,assignment]
    runner.begin({})
    assert begun == [None]


def test_a_version_goes_only_once_no_route_in_force_names_it(agent: node.Agent, envoy: NotingEnvoy) -> None:
    seen = []

    async def put(kind: str, resources: list[dict[str, Any]]) -> None:
        await asyncio.sleep(0.01)
        await NotingEnvoy.put(envoy, kind, resources)
        if kind == "clusters":
            there = gateway.arm_name("m", "2", "1") in {cluster["name"] for cluster in resources}
            seen.append((there, envoy.weights[-1]))

    async def go() -> None:
        await agent.set_route(canary(10, epoch=1))
        envoy.put = put  # type: ignore[method-assign]
        other = asyncio.create_task(agent._apply())
        back = asyncio.create_task(agent.set_route(Route("m", "1", epoch=2)))
        await asyncio.sleep(0)
        await asyncio.gather(other, back, agent.undeploy("m", "2"))

    asyncio.run(go())
    assert seen[0] == (True, 10)
    assert seen[-1] == (False, 0)
    assert (False, 10) not in seen, "its clusters went while a route in force still named them"


def test_a_replica_whose_model_hangs_is_not_ready_and_then_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers its probes as ever, and nobody else."""
    monkeypatch.setattr(supervisor, "PROBE_S", 0.1)
    monkeypatch.setattr(supervisor, "SILENT_S_MAX", 5.0)
    digest = models.slow(tmp_path / "m.onnx")
    places = Places(tmp_path, tmp_path, tmp_path / "samples", tmp_path / "m.onnx")
    launcher = Launcher(tmp_path, (*SERVER, "--run-timeout", "0.5"))
    told: asyncio.Queue[str] = asyncio.Queue()

    async def go() -> None:
        runner = VersionRunner(
            VersionSpec("m", "1", digest), places, launcher, lambda kind, says, **_: told.put_nowait(f"{kind}: {says}")
        )
        runner.begin({})
        try:
            async with asyncio.timeout(60):
                assert await told.get() == "replica-ready: replica 0 of m version 1 is ready"
                transport = httpx.AsyncHTTPTransport(uds=str(runner.replicas[0].socket))
                async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=60) as client:
                    turns = {"name": "turns", "datatype": "INT64", "shape": [1], "data": [2**40]}
                    with pytest.raises(httpx.TransportError):
                        await client.post("/v2/models/m/infer", json={"inputs": [turns]})
                assert "was not ready at 3 probes in a row" in await told.get()
                assert "was not ready for too long and is killed" in await told.get()
                assert "a run has lasted 0.5 s longer than it may" in await told.get()
                assert await told.get() == "replica-ready: replica 0 of m version 1 is ready"
        finally:
            await runner.stop(0.0)

    asyncio.run(go())


def test_a_run_hangs_only_once_every_route_has_given_up() -> None:
    assert Limits().run_s > 1.5 * max(TIMEOUT_S_MAX, LATENCY_EDGES_MS[-1] / 1000)


def test_a_replica_that_is_found_hanging_gets_no_time_as_one_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers, so it has been ready: under the agent that is gone."""
    monkeypatch.setattr(supervisor, "PROBE_S", 0.01)
    monkeypatch.setattr(supervisor, "SILENT_S_MAX", 0.1)

    async def go() -> None:
        places = Places(tmp_path, tmp_path, tmp_path, tmp_path / "m.onnx")
        found = Replica(VersionSpec("m", "1", "0" * 64), 0, places, Launcher(tmp_path), lambda *_, **__: None)
        ended = asyncio.Event()

        async def probe(_: object) -> int:
            return 503

        async def stop(_: float) -> None:
            ended.set()

        found._probe = probe  # type: ignore[method-assign]
        await found._watch(SimpleNamespace(exited=ended, stop=stop), None)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(go(), supervisor.START_S_MAX / 4))
