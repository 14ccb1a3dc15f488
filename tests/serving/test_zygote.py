"""The zygote: servers by fork, each on its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.errors import CannotServe
from serving.zygote import Zygote
from tests.serving import models
from tests.serving.running_server import ROOT, wait_for


@contextlib.contextmanager
def zygote(tmp_path: Path) -> Iterator[tuple[Zygote, subprocess.Popen[str]]]:
    place = tmp_path / "zygote.sock"
    command = [sys.executable, "-m", "serving.zygote", "--uds", str(place)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"zygote at unix:{place}\n"
        assert place.stat().st_mode & 0o777 == 0o600
        yield Zygote(place), process
    finally:
        process.terminate()
        process.communicate(timeout=10)


def arguments(tmp_path: Path, version: str) -> list[str]:
    return ["--model", "m", "--version", version, "--path", str(tmp_path / "m.onnx"), "--uds", str(tmp_path / version)]


def ready(tmp_path: Path, version: str) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(str(tmp_path / version))
        except OSError:
            return False
        peer.sendall(f"GET /v2/models/m/versions/{version}/ready HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        return b" 200 " in peer.recv(4096)


def test_a_server_that_nobody_waits_for_any_more_is_not_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gave up has started one without the zygote, for the same socket."""
    models.score(tmp_path / "m.onnx")
    with zygote(tmp_path) as (started, process):
        process.send_signal(signal.SIGSTOP)
        with monkeypatch.context() as patched:
            patched.setattr("serving.zygote._PATIENCE_S", 0.2)
            with pytest.raises(CannotServe, match="timed out"):
                started.spawn(arguments(tmp_path, "1"), tmp_path / "1.log")
        process.send_signal(signal.SIGCONT)
        pid = started.spawn(arguments(tmp_path, "2"), tmp_path / "2.log")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children == [str(pid)]
        wait_for(lambda: ready(tmp_path, "2"))
        os.kill(pid, signal.SIGTERM)


def test_what_servers_need_is_loaded_before_they_are_forked(tmp_path: Path) -> None:
    """Else each would take its own time and memory for it."""
    with zygote(tmp_path) as (_, process):
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert "onnxruntime_pybind11_state" in mapped
    assert "uvloop" in mapped


def test_a_crash_of_one_server_touches_no_other_and_how_it_ended_is_known(tmp_path: Path) -> None:
    models.score(tmp_path / "m.onnx")
    with zygote(tmp_path) as (nursery, _):
        pids = {version: nursery.spawn(arguments(tmp_path, version), tmp_path / "log") for version in ("1", "2")}
        for version in pids:
            wait_for(lambda version=version: ready(tmp_path, version))
        os.kill(pids["1"], signal.SIGKILL)
        wait_for(lambda: pids["1"] in nursery.exits())
        assert nursery.exits() == {pids["1"]: -signal.SIGKILL}
        assert ready(tmp_path, "2")
        os.kill(pids["2"], signal.SIGTERM)
        wait_for(lambda: pids["2"] in nursery.exits())
        assert nursery.exits()[pids["2"]] == 0


def test_servers_outlive_the_zygote(tmp_path: Path) -> None:
    models.score(tmp_path / "m.onnx")
    with zygote(tmp_path) as (nursery, process):
        pid = nursery.spawn(arguments(tmp_path, "1"), tmp_path / "log")
        wait_for(lambda: ready(tmp_path, "1"))
        process.kill()
        process.wait(10)
        assert ready(tmp_path, "1")
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not (tmp_path / "1").exists())


def test_what_cannot_be_served_ends_with_its_code_and_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with zygote(tmp_path) as (nursery, _):
        wrong_file = nursery.spawn(arguments(tmp_path, "1"), tmp_path / "log")
        wrong_usage = nursery.spawn(["--nonsense"], tmp_path / "usage")
        wait_for(lambda: len(nursery.exits()) == 2)
        assert nursery.exits() == {wrong_file: 3, wrong_usage: 2}
        assert "not a model that ONNX Runtime can load" in (tmp_path / "log").read_text()


def test_no_zygote_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match="does not answer"):
        Zygote(tmp_path / "none").exits()


def test_a_wrong_question_is_refused_and_the_next_one_answered(tmp_path: Path) -> None:
    with zygote(tmp_path) as (nursery, _):
        with pytest.raises(CannotServe, match="'argv' must be a list of strings"):
            nursery._ask({"argv": 7})
        with pytest.raises(CannotServe, match="No such file or directory"):
            nursery.spawn([], tmp_path / "none" / "log")
        assert nursery.exits() == {}
