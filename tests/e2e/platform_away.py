"""While Prefect's server is away, with hints that get lost, and on other work pools: `make platform`.

Not in the suite, for the minutes that it takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from flows.deployments import ALL, flow_of
from infra.platform_local import running
from infra.router_envoy import EnvoyRouter
from tests.e2e import hints, toy
from tests.e2e.hints import part
from tests.e2e.running_platform import Clients, Platform, wait_until
from tests.e2e.test_platform import PARTS, platform, server, wrong

__all__ = ["platform", "server"]  # the fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::Warning")]
ROOT = Path(__file__).resolve().parents[2]


def test_while_prefect_s_server_is_away_traffic_goes_back_at_once(platform: Platform) -> None:
    addresses = running(platform.home)
    assert addresses is not None
    router = EnvoyRouter(addresses.agent_home)
    for number in (1, 2):
        with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST):
            run = platform.deliver(toy.make(platform.files / f"v{number}", seed=number))
            assert run.code == 0, run.err + run.out
    before = router.current("toy")
    assert before is not None
    folder = toy.make(platform.files / "v3", seed=3)
    with ThreadPoolExecutor() as pool, Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST) as traffic:
        delivery = pool.submit(platform.deliver, folder)
        wait_until(lambda: (route := router.current("toy")) is not None and route.candidate is not None, 120, "a share")
        with away(addresses.pid, part(platform, PARTS["Prefect"])):
            began = time.monotonic()
            assert platform.lockgate("abort", "toy").code == 0
            wait_until(
                lambda: (route := router.current("toy")) is not None and route.candidate is None, 30, "it is back"
            )
            back_s = time.monotonic() - began
            seen = platform.lockgate("status", "--json")
            assert seen.code == 0, seen.err
            (model,) = [each for each in seen.json["models"] if each["model"] == "toy"]
            assert (model["traffic"], model["state"]) == (f"v{before.stable} 100 %", "rolled back")
            assert "Prefect" in wrong(platform)
            told = platform.deliver(folder)
            assert (told.code, "lockgate doctor" in told.err) == (3, True), told.err
            run = platform.lockgate("rollback", "toy", "--json", "--reason", "the server is away")
            assert run.code == 0, run.err
            now = router.current("toy")
            assert now is not None
            assert now.stable not in (None, before.stable), "the former version serves"
        assert delivery.result(180).code == 1, "the delivery's own process comes to its end, too"
    assert traffic.failed() == []
    print(f"abort ordered, and the traffic back, within {back_s:.1f} s without Prefect's server")
    wait_until(lambda: not wrong(platform), 120, "the platform is well again by its own word")


@contextlib.contextmanager
def away(supervisor: int, process: psutil.Process | None) -> Iterator[None]:
    """The process is killed, and not started again before the block ends."""
    assert process is not None
    os.kill(supervisor, signal.SIGSTOP)
    try:
        for each in [process, *process.children(recursive=True)]:
            each.kill()
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)


def test_lossy_hints_lose_nothing_and_bring_nothing_twice(platform: Platform) -> None:
    story = hints.Story(platform, count=6, seed=7)
    story.play()
    assert story.broken() == []
    assert story.courier.did["dropped"] > 0, "the seed drops some"
    assert story.refused["stale"] > 0
    assert story.refused["forged"] > 0


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_the_same_deployments_stand_on_other_work_pools_by_configuration_alone(
    platform: Platform, tmp_path: Path, kind: str
) -> None:
    api = f"http://127.0.0.1:{platform.ports['PREFECT']}/api"

    def prefect(*arguments: object) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *map(str, arguments)]
        env = {**os.environ, "PREFECT_API_URL": api, "PREFECT_HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr + done.stdout

    prefect("work-pool", "create", f"on-{kind}", "--type", kind)
    file = tmp_path / "prefect.yaml"
    file.write_text((ROOT / "infra" / "prefect.yaml").read_text().replace("{name: lockgate,", f"{{name: on-{kind},"))
    prefect("deploy", "--all", "--prefect-file", file)
    for each in ALL:
        made = httpx.get(f"{api}/deployments/name/{each.name}/{each.name}").json()
        assert (made["work_pool_name"], made["work_queue_name"]) == (f"on-{kind}", each.queue)
        assert made["entrypoint"] == each.entrypoint
        assert set(made["parameter_openapi_schema"]["properties"]) == set(flow_of(each).parameters.properties)
        assert bool(made["schedules"]) == bool(each.cron or each.interval_s)
