"""The model server as a process: what the node agent and the gateway rely on."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from serving.processes import listening_on
from tests.serving import models
from tests.serving.running_server import ROOT, running, wait_for


def infer(client: httpx.Client, name: str, datatype: str, data: list, **extra) -> httpx.Response:
    shape = [len(data), len(data[0])] if isinstance(data[0], list) else [len(data)]
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    return client.post("/v2/models/m/infer", json={"inputs": [tensor], **extra})


def test_serves_predicts_and_leaves_in_good_order(tmp_path: Path) -> None:
    digest = models.score(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx", "--digest", digest) as server:
        answer = infer(server.client, "f", "FP32", [[0, 0, 0, 0]], id="mine")
        assert answer.status_code == 200
        assert answer.json()["id"] == "mine"
        assert answer.json()["outputs"][0] == {"name": "score", "datatype": "FP32", "shape": [1, 1], "data": [0.5]}
        assert server.client.get("/v2/health/ready").status_code == 200
        assert server.metric("lockgate_requests_total", code="200") == 1
        assert server.stop() == (0, "")


def test_other_bytes_than_asked_for_are_not_served(tmp_path: Path) -> None:
    models.score(tmp_path / "m.onnx")
    assert _refusal(tmp_path / "m.onnx", "--digest", "0" * 64).startswith(f"'{tmp_path}/m.onnx' has SHA-256")


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    assert "is not a model that ONNX Runtime can load" in _refusal(tmp_path / "m.onnx")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "none.onnx")


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    models.score(tmp_path / "m.onnx")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen on 127.0.0.1" in _refusal(tmp_path / "m.onnx", "--port", str(taken.getsockname()[1]))


def _refusal(path: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "serving.server", "--model", "m", "--path", str(path), "--port", "0", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_a_unix_socket_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    models.score(tmp_path / "m.onnx")
    place = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))  # what a killed process leaves
    command = [sys.executable, "-m", "serving.server", "--model", "m", "--path", str(tmp_path / "m.onnx")]
    process = subprocess.Popen([*command, "--uds", str(place)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert f"unix:{place}" in process.stdout.readline()
    assert place.stat().st_mode & 0o777 == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(place)), base_url="http://here") as client:
        assert infer(client, "f", "FP32", [[0, 0, 0, 0]]).status_code == 200
        second = subprocess.run([*command, "--uds", str(place)], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert "somebody listens there already" in second.stderr
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert not place.exists()


def test_in_a_batch_only_the_request_at_fault_errs(tmp_path: Path) -> None:
    models.picky(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx") as server, ThreadPoolExecutor(8) as pool:
        wanted = [index if index % 10 else 99 for index in range(4)] * 50

        def ask(index: int) -> httpx.Response:
            return infer(server.client, "i", "INT64", [index])

        for index, answer in zip(wanted, pool.map(ask, wanted), strict=True):
            if index == 99:
                assert answer.status_code == 500
                assert "the model failed" in answer.json()["error"]
            else:
                assert answer.json()["outputs"][0]["data"] == [(index + 1) * 10]
        assert server.metric("lockgate_errors_total") == wanted.count(99)
        assert server.metric("lockgate_requests_total", code="500") == wanted.count(99)


def test_a_slow_run_leaves_health_and_metrics_answered(tmp_path: Path) -> None:
    models.slow(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx") as server, ThreadPoolExecutor(1) as pool:
        turns = _turns_for(server.client, seconds=1.0)
        running_one = pool.submit(infer, server.client, "turns", "INT64", [turns])
        looks = 0
        while not running_one.done():
            assert server.client.get("/v2/health/ready").status_code == 200
            assert server.client.get("/metrics").status_code == 200
            looks += 1
        assert running_one.result().status_code == 200
        assert looks > 10  # had the run blocked the loop, the first look would have outlasted it


def _turns_for(client: httpx.Client, seconds: float) -> int:
    turns = 1000
    while True:
        start = time.perf_counter()
        assert infer(client, "turns", "INT64", [turns]).status_code == 200
        took = time.perf_counter() - start
        if took > seconds / 20:
            return int(turns * seconds / took)
        turns *= 4


def test_a_run_that_lasts_too_long_makes_the_server_not_ready_until_it_ends(tmp_path: Path) -> None:
    models.slow(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx") as server:
        turns = _turns_for(server.client, seconds=10.0)
    with running(tmp_path / "m.onnx", "--run-timeout", "0.1") as server, ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(infer, server.client, "turns", "INT64", [turns])
        wait_for(lambda: server.client.get("/v2/health/ready").status_code == 503)
        assert not running_one.done()
        assert server.client.get("/v2/models/m/ready").json() == {"name": "m", "ready": False}
        assert server.metric("lockgate_ready") == 0
        assert running_one.result().status_code == 200
        wait_for(lambda: server.client.get("/v2/health/ready").status_code == 200)
        code, err = server.stop()
    assert code == 0
    assert err == "a run has lasted 0.1 s longer than it may: not ready until it ends\n"


def test_sigterm_finishes_what_was_accepted(tmp_path: Path) -> None:
    models.slow(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx") as server:
        turns = _turns_for(server.client, seconds=1.0)
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(infer(server.client, "turns", "INT64", [turns])))
        asking.start()
        wait_for(lambda: server.metric("lockgate_running_rows") == 1)
        code, err = server.stop()
        asking.join(10)
        assert (code, err) == (0, "")
        assert [answer.status_code for answer in answers] == [200]
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/v2/health/live")


def test_sampled_rows_are_on_disk_after_the_drain(tmp_path: Path) -> None:
    models.score(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx", "--samples", str(tmp_path / "rows")) as server:
        for at in range(5):
            data = [[at, 0, 0, 0], [-at, 0, 0, 0]]
            body = {"inputs": [{"name": "f", "shape": [2, 4], "datatype": "FP32", "data": data}]}
            server.client.post("/v2/models/m/infer", json=body, headers={"x-request-id": f"r{at}"})
        server.client.post("/v2/models/m/infer", json=body, headers={"x-lockgate-apart": "true"}).raise_for_status()
        server.stop()
    tables = [pa.ipc.open_file(path).read_all() for path in sorted((tmp_path / "rows").glob("*.arrow"))]
    rows = pa.concat_tables(tables).to_pylist()
    assert [(row["request_id"], row["row"]) for row in rows] == [(f"r{at}", row) for at in range(5) for row in (0, 1)]
    assert [row["in.f.0"] for row in rows] == [0, 0, 1, -1, 2, -2, 3, -3, 4, -4]
    assert all(abs(row["prediction"] - 1 / (1 + 2.718281828 ** -row["in.f.0"])) < 1e-6 for row in rows)
    assert {row["status"] for row in rows} == {200}


def test_on_a_full_disk_it_starts_serves_and_keeps_samples_again_once_there_is_room(tmp_path: Path) -> None:
    """Its output is a log on the same disk: what it would say there is lost, and nothing else."""
    models.score(tmp_path / "m.onnx")
    samples, uds = tmp_path / "samples", tmp_path / "s.sock"
    command = [sys.executable, "-m", "serving.server", "--model", "m", "--path", str(tmp_path / "m.onnx")]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [*command, "--uds", str(uds), "--samples", str(samples)], cwd=ROOT, stdout=full, stderr=full
        )
    try:
        wait_for(lambda: listening_on(uds) or process.poll() is not None, 30.0)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://here") as client:
            assert infer(client, "f", "FP32", [[0, 0, 0, 0]]).status_code == 200
            wait_for(lambda: list(samples.glob("*.arrow")) != [])
            shutil.rmtree(samples)
            samples.write_text("no room for a file")
            assert infer(client, "f", "FP32", [[0, 0, 0, 0]]).status_code == 200
            wait_for(lambda: 'samples_dropped_total{model="m",version="1"} 1' in client.get("/metrics").text)
            samples.unlink()
            samples.mkdir()
            assert infer(client, "f", "FP32", [[0, 0, 0, 0]]).status_code == 200
            wait_for(lambda: list(samples.glob("*.arrow")) != [])
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
