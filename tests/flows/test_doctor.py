"""`lockgate doctor` names what is wrong: each check sees its kind of trouble, and none where there is none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest

from flows.doctor import policies, traffic, variables
from flows.settings import Settings
from flows.story import fold
from infra import health_local as health
from infra.platform_local import free_port, running
from policies.events import Checked, Do, Done, Phase, Requested, to_body
from policies.policy_yaml import parse
from policies.rollout import terms
from policies.traffic import Route
from policies.verdict import Verdict
from tasks.ports import PortError
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


def asked_for() -> FakeLedger:
    """A ledger with one rollout of m's version 2, written at 100 s, that has not begun."""
    book = FakeLedger(lambda: 100.0)
    policy = parse(POLICY)
    kind, body = to_body(Requested(100.0, 0, "m", "2", "digest", "1", terms(policy)))
    book.append("r", 1, 100.0, "t", kind, {**body, "policy": policy.model_dump(mode="json", by_alias=True)})
    return book


def in_canary() -> tuple[FakeLedger, int]:
    """The same rollout with 10 % of the traffic, and the epoch by which it has them."""
    book = asked_for()
    while (state := fold(book.read("r"))) is not None and (state.phase is not Phase.CANARY or state.pending):
        effect = state.pending[0]
        checked = Checked(100.0, 0, Verdict.PASS, "")
        kind, body = to_body(checked if effect.do is Do.CHECK else Done(100.0, 0, effect.id))
        book.append("r", len(book.read("r")) + 1, 100.0, "t", kind, body)
    assert state is not None
    return book, state.epoch


def test_a_share_that_no_rollout_gave_and_one_that_is_missing_are_told() -> None:
    held = {"m": Route("m", stable="1", candidate="2", weight=10, epoch=4)}
    seen = traffic(FakeLedger(lambda: 100.0), [], held, 100.0)
    assert (seen.ok, "no rollout under way gave it" in seen.says) == (False, True)
    none = {"m": Route("m", stable="1", epoch=1)}
    assert traffic(asked_for(), ["r"], none, 100.0).ok, "it has not begun"
    book, epoch = in_canary()
    for other in (none, {"m": replace(held["m"], epoch=epoch + 1)}, {}):
        seen = traffic(book, ["r"], other, 100.0)
        assert (seen.ok, seen.says) == (False, f"r thinks that v2 has traffic by epoch {epoch}; it has not")


def test_a_rollout_that_cannot_be_read_is_named_and_the_others_are_looked_at() -> None:
    book, _ = in_canary()
    book.append("of tomorrow", 1, 100.0, "t", "requested", {"model": "other", "more": "than we know"})
    seen = traffic(book, ["of tomorrow", "r"], {}, 100.0)
    assert not seen.ok
    assert "rollout of tomorrow cannot be read" in seen.says
    assert "r thinks that v2 has traffic" in seen.says


def test_a_rollout_that_nobody_drives_is_told() -> None:
    book, epoch = in_canary()
    held = {"m": Route("m", stable="1", candidate="2", weight=10, epoch=epoch)}
    assert traffic(book, ["r"], held, 100.0).ok
    lease = parse(POLICY).rollout.lease
    assert traffic(book, ["r"], held, 100.0 + lease + 59.0).ok
    seen = traffic(book, ["r"], held, 100.0 + lease + 61.0)
    assert (seen.ok, seen.says) == (False, f"nobody has driven r for {lease + 61.0:.0f} s")


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A home below a folder that this process may not enter."""
    closed = tmp_path / "closed"
    (closed / "home").mkdir(parents=True)
    closed.chmod(0)
    if root := os.getuid() == 0:  # whom no folder is closed to
        os.setresuid(65534, 65534, 0)
    yield closed / "home"
    if root:
        os.setresuid(0, 0, 0)
    closed.chmod(0o700)


def test_a_home_below_a_closed_folder_is_told(closed: Path) -> None:
    assert not health.folder(closed).ok
    assert "cannot be looked at: Permission denied" in health.permissions(closed).says
    assert "cannot be looked at: Permission denied" in policies(Settings(home=closed)).says
    with pytest.raises(PortError, match="Permission denied"):
        running(closed)


@pytest.mark.parametrize("url", ["http://host:port", "nonsense", "http://[::1"])
def test_what_is_no_address_is_told(url: str) -> None:
    for seen in (next(health.prefect(url)), next(health.mlflow(url)), health.worker(url, "p")):
        assert (seen.ok, bool(seen.says and seen.todo)) == (False, True)
    assert not health.schedules(url, ["a/b"], "q").ok
    assert not health.answers(url, 1.0)


class Guarded(BaseHTTPRequestHandler):
    """A server that tells its version to whoever logs in as ann."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] in ("Basic YW5uOnNlY3JldA==", "Bearer token")
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(version("prefect" if "api" in self.path else "mlflow").encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def guarded() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "log_ins"),
    [
        ("Prefect", [{"PREFECT_API_AUTH_STRING": "ann:secret"}, {"PREFECT_API_KEY": "token"}]),
        (
            "MLflow",
            [
                {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "secret"},
                {"MLFLOW_TRACKING_TOKEN": "token"},
            ],
        ),
    ],
)
def test_a_server_that_wants_a_log_in_is_asked_with_its_client_s_and_else_it_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, guarded: str, name: str, log_ins: list[dict[str, str]]
) -> None:
    ask = {"Prefect": health.prefect, "MLflow": health.mlflow}[name]
    seen = next(ask(guarded))
    assert (seen.ok, "wants another log-in" in seen.says) == (False, True)
    for log_in in log_ins:
        assert all(variable in seen.todo for variable in log_in)
        with monkeypatch.context() as patched:
            for variable, value in log_in.items():
                patched.setenv(variable, value)
            assert all(each.ok for each in ask(guarded))
    if name == "Prefect":
        assert "wants another log-in" in health.worker(f"{guarded}/api", "p").says
        assert "wants another log-in" in health.schedules(f"{guarded}/api", ["a/b"], "q").says


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
