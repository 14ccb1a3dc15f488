"""`lockgate plan`, `labels` and what `deliver --rps` refuses, as a shell sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows import cli
from flows.planning import measure
from policies.evidence import Counts
from policies.policy_yaml import parse
from tasks.ports import NotThere
from tests.stories.world import MODEL, World

POLICY = """
policy: p
rollout:
  stages:
    - shadow: {share: 1.0, for: 2m}
    - canary: {weight: 10, for: 10m}
  gates:
    errors: {margin: 0.01}
    quality: {margin: 0.03}
"""


@dataclass(frozen=True)
class Said:
    exit_code: int
    stdout: str
    stderr: str


Lockgate = Callable[..., Said]


@pytest.fixture
def lockgate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lockgate:
    """The command line, as the console script runs it."""

    def run(*arguments: str) -> Said:
        monkeypatch.setattr("sys.argv", ["lockgate", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Said(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOCKGATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(POLICY)
    return str(tmp_path / "p.yaml")


def test_a_plan_that_can_see_what_it_guards_is_done(lockgate: Lockgate, policy: str) -> None:
    found = lockgate("plan", policy, "--rps", "50", "--json")
    assert found.exit_code == 0
    body = json.loads(found.stdout)
    assert body["ok"]
    assert [stage["name"] for stage in body["stages"]] == ["shadow 100 %", "canary 10 %", "watch"]
    assert [gate["gate"] for gate in body["stages"][1]["gates"]] == ["errors", "quality"]


def test_a_blind_plan_is_refused_with_the_reason_and_what_would_mend_it(lockgate: Lockgate, policy: str) -> None:
    found = lockgate("plan", policy, "--rps", "2")
    assert found.exit_code == 2
    assert "'errors' can hardly rule out 1 points more in 10m" in found.stderr
    assert "What would mend it: `for: " in found.stderr


def test_labels_that_lag_longer_than_the_rollout_are_a_problem_of_the_plan(lockgate: Lockgate, policy: str) -> None:
    found = lockgate("plan", policy, "--rps", "500", "--label-lag", "3600")
    assert found.exit_code == 2
    assert "'quality' can hardly rule out a mean loss higher by 0.03" in found.stderr


def test_a_delivery_is_refused_for_a_blind_plan_only_if_the_traffic_is_said(lockgate: Lockgate, policy: str) -> None:
    blind = lockgate("deliver", "m", "--file", "x.onnx", "--policy", policy, "--rps", "1")
    assert blind.exit_code == 2
    assert "can hardly rule out" in blind.stderr
    unknown = lockgate("deliver", "m", "--file", "x.onnx", "--policy", policy)
    assert "can hardly rule out" not in unknown.stderr


@pytest.mark.parametrize("given", [[], ["--rps", "5", "--measured", "m"]])
def test_the_traffic_is_said_once(lockgate: Lockgate, policy: str, given: list[str]) -> None:
    found = lockgate("plan", policy, *given)
    assert (found.exit_code, found.stderr) == (
        2,
        "lockgate: say the traffic with exactly one of --rps and --measured\n",
    )


def test_labels_are_stored_without_a_running_platform(lockgate: Lockgate, policy: str, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("request_id,label\na,1\nb,0\n")
    found = lockgate("labels", "m", "l.csv", "--json")
    assert json.loads(found.stdout) == {"model": "m", "labels": 2}
    assert len(list((tmp_path / "home").rglob("*.arrow"))) == 1


def test_measured_traffic_is_that_of_the_live_version() -> None:
    world = World(rps=120.0).given("1", errors=0.02, slow=0.05)
    policy = parse(POLICY.replace("errors: {margin: 0.01}", "latency: {slo_ms: 100}"))
    world.clock.sleep(100.0)
    seen = measure(world.ports, MODEL, policy)
    assert seen.rps == pytest.approx(120.0, rel=0.02)
    assert seen.error_rate == pytest.approx(0.02, rel=0.05)
    assert seen.slow_rate == pytest.approx(0.05, rel=0.05)


def test_traffic_that_is_not_there_cannot_be_measured() -> None:
    world = World()
    world.telemetry.silent = True
    with pytest.raises(NotThere, match="--rps"):
        measure(world.ports, MODEL, world.policy)
    assert isinstance(world.telemetry.counts(MODEL, "1", False), Counts)
