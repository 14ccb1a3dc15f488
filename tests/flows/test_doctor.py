"""`lockgate doctor` names what is wrong: each check sees its kind of trouble, and none where there is none."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.doctor import policies, traffic, variables
from flows.settings import Settings
from infra import health_local as health
from infra.platform_local import free_port
from policies.events import Requested, to_body
from policies.policy import parse
from policies.rollout import terms
from policies.traffic import Route
from tests.fakes.ledger import FakeLedger

POLICY = "policy: p\nrollout: {stages: [canary: {weight: 10, for: 5s}]}\n"


def test_versions_that_are_known_to_break_are_named_with_what_they_break() -> None:
    newer = {"fastapi": "0.155.0", "sqlalchemy": "2.1.0", "pandas": "3.0.1"}
    seen = health.packages(installed=lambda name: newer.get(name) or version(name))
    assert not seen.ok
    for name, why in health.BREAKS.items():
        assert f"{name} {newer[name]}" in seen.says
        assert why in seen.says
    assert health.packages().ok, "what is installed here is what the lock file says"


def test_a_mistyped_variable_is_told_with_what_is_meant() -> None:
    seen = variables({"LOCKGATE_PREFECTPORT": "1", "PATH": "x"})
    assert not seen.ok
    assert "LOCKGATE_PREFECT_PORT meant" in seen.says
    assert variables({"LOCKGATE_PREFECT_PORT": "1", "LOCKGATE_HOME": "x"}).ok


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        seen = health.ports({"MLflow": port, "receiver": None})
        assert (seen.ok, f"{port} (MLflow)" in seen.says) == (False, True)
    assert health.ports({"MLflow": port}).ok


def test_secrets_that_others_can_read_are_told(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "secrets").mkdir(parents=True)
    home.chmod(0o700)
    (home / "secrets" / "hints").touch(0o644)
    assert health.permissions(home).ok, "nobody else comes through the closed folder"
    for above in (home, *list(tmp_path.parents)[:2], tmp_path):
        above.chmod(0o755)
    seen = health.permissions(home)
    assert (seen.ok, "secrets/hints" in seen.says) == (False, True)


def test_policies_that_cannot_be_read_or_contradict_each_other_are_told(tmp_path: Path) -> None:
    settings = Settings(policies=tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"model: m\n{POLICY}")
    (tmp_path / "three.yaml").write_text("policy: p\nrolout: {}\n")
    seen = policies(settings)
    assert not seen.ok
    assert "all for model 'm'" in seen.says
    assert "three.yaml" in seen.says
    (tmp_path / "two.yaml").unlink()
    (tmp_path / "three.yaml").unlink()
    assert policies(settings).ok


def in_canary() -> FakeLedger:
    """A ledger with one rollout of m's version 2 that has 10 % by epoch 4, written at 100 s."""
    book = FakeLedger(lambda: 100.0)
    policy = parse(POLICY)
    kind, body = to_body(Requested(100.0, 0, "m", "2", "digest", "1", terms(policy)))
    book.append("r", 1, 100.0, "t", kind, {**body, "policy": policy.model_dump(mode="json", by_alias=True)})
    return book


def test_a_share_that_no_rollout_gave_and_one_that_is_missing_are_told() -> None:
    held = {"m": Route("m", stable="1", candidate="2", weight=10, epoch=4)}
    seen = traffic(FakeLedger(lambda: 100.0), [], held, 100.0)
    assert (seen.ok, "no rollout under way gave it" in seen.says) == (False, True)
    assert traffic(in_canary(), ["r"], {"m": Route("m", stable="1", epoch=1)}, 100.0).ok, "it has not begun"


@pytest.mark.parametrize("file", [None, "home = 3\nnosuch = 1\n"])
def test_it_ends_with_1_where_something_is_wrong_and_changes_nothing(tmp_path: Path, file: str | None) -> None:
    home = tmp_path / "home"
    if file:
        (tmp_path / "lockgate.toml").write_text(file)
    command = [sys.executable, "-m", "flows.cli", "doctor", "--json"]
    ports = {f"LOCKGATE_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW", "GATEWAY")}
    root = Path(__file__).resolve().parents[2]
    env = {"PATH": "/usr/bin:/bin", "LOCKGATE_HOME": str(home), "PYTHONPATH": str(root), **ports}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60, check=False)
    found = json.loads(done.stdout)
    wrong = {each["what"]: each["todo"] for each in found if not each["ok"]}
    assert (done.returncode, bool(wrong)) == ((1, True) if file else (0, False)), wrong
    assert all(wrong.values())
    assert not home.exists()


def test_a_folder_has_one_name_however_it_is_reached(tmp_path: Path) -> None:
    """Else a command that comes through a link takes the platform's ledger for another."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Settings(home=tmp_path / "link").folder == Settings(home=tmp_path / "real").folder
