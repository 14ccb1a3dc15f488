"""The command line: every error is a sentence, and its exit code tells a refusal from a mistake and from a failure."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.settings import read_settings
from flows.wiring import ledger
from policies import monitor


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCKGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # these are the tests' own
    for name in ("LOCKGATE_DATABASE", "LOCKGATE_LEDGER_URL"):  # a demo sets them
        monkeypatch.setenv(name, "")
    return tmp_path / "home"


def lockgate(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["lockgate", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("part", ["prefect", "mlflow", "gateway", "evidently", "trigger"])
@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_cannot_be_is_wrong_usage(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str, port: str
) -> None:
    monkeypatch.setattr("flows.platform.up", lambda *_: 0)
    assert lockgate(monkeypatch, "up", f"--{part}-port", port) == 2
    assert f"Invalid value for '--{part}-port'" in capsys.readouterr().err


def test_settings_that_cannot_be_read_are_wrong_usage(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("lockgate.toml").write_text("home = [oops")
    for command in ("status", "demo"):
        assert lockgate(monkeypatch, command) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", [("audit", "export"), ("demo", "--json")])
def test_a_file_that_cannot_be_written_is_wrong_usage(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert lockgate(monkeypatch, *command, "nowhere/x") == 2
    assert capsys.readouterr().err.startswith("lockgate: nowhere/x cannot be written")


def test_an_empty_digest_lifts_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = ledger(read_settings())
    book.quarantine("3f9a", "too many errors", "r1")
    assert lockgate(monkeypatch, "quarantine", "lift", "", "--reason", "x") == 2
    assert "name the digest" in capsys.readouterr().err
    assert book.quarantined("3f9a") == "too many errors"
    assert lockgate(monkeypatch, "quarantine", "lift", "3f", "--reason", "x") == 0
    assert book.quarantined("3f9a") is None


@pytest.mark.parametrize(
    "command", [("explain", "monitor/m"), ("explain", "quarantine/3f9a"), ("audit", "replay", "quarantine/3f9a")]
)
def test_what_is_in_the_ledger_and_no_rollout_is_wrong_usage(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    book = ledger(read_settings())
    book.quarantine("3f9a", "too many errors", "r1")
    book.append("monitor/m", 1, 1.0, "monitor", monitor.LOOKED, {"says": "all is well"})
    assert lockgate(monkeypatch, *command) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lockgate: '{command[-1]}' is no rollout")
    assert told.count("\n") == 1


def test_what_nobody_foresaw_is_told_at_the_end_and_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise KeyError("uid not found: 54321")

    monkeypatch.setattr(cli, "app", fail)
    assert lockgate(monkeypatch, "rollback", "m") == 3
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith("Traceback")
    assert last.startswith("lockgate: not foreseen: KeyError: 'uid not found: 54321'")


@pytest.mark.parametrize("ending", [SystemExit(1), SystemExit(2), KeyboardInterrupt()])
def test_who_ends_on_purpose_ends_as_meant(monkeypatch: pytest.MonkeyPatch, ending: BaseException) -> None:
    def end() -> None:
        raise ending

    monkeypatch.setattr(cli, "app", end)
    with pytest.raises(type(ending)) as ended:
        cli.main()
    assert ended.value is ending


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/srv/ledger.db")

    monkeypatch.setattr(cli, "app", fail)
    assert lockgate(monkeypatch, "status") == 3
    assert capfd.readouterr().err.startswith("lockgate: the disk is full (/srv/ledger.db)")
