"""`lockgate serve FILE` is one model server and nothing else."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e import toy

pytestmark = pytest.mark.e2e


def serve(path: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", str(path), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_is_served_under_its_own_name_and_ends_cleanly(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = serve(toy.make(tmp_path) / "model.onnx", "--port", str(port))
    url = f"http://127.0.0.1:{port}/v2/models/model"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = httpx.post(f"{url}/infer", json={"inputs": [toy.REQUEST]}, timeout=5)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the server does not answer"
                assert process.poll() is None, "the server has ended"
                time.sleep(0.1)
        assert answer.status_code == 200
        assert {each["name"] for each in answer.json()["outputs"]} == {"label", "probabilities"}
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    process = serve(tmp_path / "nowhere.onnx")
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "nowhere.onnx" in said
    assert "Traceback" not in said
