"""The probe, on real model servers: the right prediction for each row, failures told of the rows that have them."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from infra import probe_http
from infra.probe_http import HttpProbe
from tasks.ports import BadInput, Endpoint, PortError
from tests.infra.onnx_models import logistic, save
from tests.ports.probe_contract import ProbeContract

ROWS = 300


def picky() -> Any:
    """`p = 0.25` for any `k` in 0..3 per row; a `k` beyond that is an error of the runtime (Gather out of range)."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "k"], ["g"]),
            helper.make_node("Cast", ["word"], ["w"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["g", "w"], ["p"]),
        ],
        "picky",
        [value("k", TensorProto.INT64, ["N", 1]), value("word", TensorProto.STRING, ["N", 1])],
        [value("p", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor("table", TensorProto.FLOAT, [4], [0.25] * 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Endpoint]]:
    """Two servers of the logistic model (`a`, `b`) and one of `picky`."""
    folder = tmp_path_factory.mktemp("servers")
    processes, endpoints = [], {}
    for name, model in (("a", logistic()), ("b", logistic((2.0, 1.0))), ("picky", picky())):
        path, socket = save(model, folder / f"{name}.onnx"), folder / f"{name}.sock"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        command = [sys.executable, "-m", "serving.server", "--model", "m", "--version", name, "--path", str(path)]
        processes.append(subprocess.Popen([*command, "--digest", digest, "--uds", str(socket)]))
        endpoints[name] = Endpoint("m", name, f"unix:{socket}")
    try:
        for name, process in zip(endpoints, processes, strict=True):
            _await(folder / f"{name}.sock", process)
        yield endpoints
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=20)


def _await(socket: Path, process: subprocess.Popen[bytes], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        if socket.exists():
            return
        time.sleep(0.05)
    raise RuntimeError(f"no model server at {socket} (code {process.poll()})")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    x = np.random.default_rng(1).normal(size=(ROWS, 2)).astype("float32")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x.0": x[:, 0], "x.1": x[:, 1], "late": np.zeros(ROWS)}), path)
    return path


class TestHttpProbe(ProbeContract):
    @pytest.fixture
    def probe(self) -> HttpProbe:
        return HttpProbe()

    @pytest.fixture
    def there(self, servers: dict[str, Endpoint]) -> Endpoint:
        return servers["a"]

    @pytest.fixture
    def absent(self, tmp_path: Path) -> Endpoint:
        return Endpoint("m", "9", f"unix:{tmp_path}/nobody.sock")


def test_each_row_gets_its_own_prediction_in_the_files_order(servers: dict[str, Endpoint], rows: Path) -> None:
    table = pq.read_table(rows)
    x = np.stack([table["x.0"].to_numpy(), table["x.1"].to_numpy()], axis=1)
    answers = HttpProbe(chunk_rows=64).ask(servers["a"], rows, "late", limit=250)
    assert answers.failures == ()
    np.testing.assert_allclose(answers.predictions, 1 / (1 + np.exp(x[:250, 1] - x[:250, 0])), rtol=1e-5)


def test_rows_that_fail_are_named_and_the_others_in_their_chunk_are_not(
    servers: dict[str, Endpoint], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    wrong = {7, 93}
    path.write_text("k,word\n" + "\n".join(f"{9 if i in wrong else i % 4},{i % 3}" for i in range(100)))
    answers = HttpProbe(chunk_rows=32).ask(servers["picky"], path, None, limit=1000)
    assert [i for i, p in enumerate(answers.predictions) if math.isnan(p)] == sorted(wrong)
    assert [failure.split(":")[0] for failure in answers.failures] == ["row 7", "row 93"]
    assert answers.predictions[2] == 0.5


def test_an_answer_that_is_no_number_is_a_failure_of_its_row(servers: dict[str, Endpoint], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("x.0,x.1\n1,1\n,1\n1,1\n")
    answers = HttpProbe().ask(servers["a"], path, None, limit=10)
    np.testing.assert_array_equal(answers.predictions, [0.5, math.nan, 0.5])
    assert answers.failures == ("row 1: the prediction is nan, not a number",)


def test_versions_in_a_race_are_measured_on_as_many_requests_and_told_their_memory(
    servers: dict[str, Endpoint], rows: Path
) -> None:
    seen = HttpProbe().race([servers["a"], servers["b"]], rows, "late", duration_s=1.0)
    assert [speed.failed for speed in seen] == [0, 0]
    for speed in seen:
        assert len(speed.latency_ms) > 50
        assert speed.throughput_rps > 0
        assert speed.memory_mb > 10
    ratio = np.quantile(seen[0].latency_ms, 0.1) / np.quantile(seen[1].latency_ms, 0.1)
    assert 1 / 3 < ratio < 3, "the same graph on the same rows in the same run; a low quantile minds no busy machine"


def test_a_version_that_fails_on_rows_has_them_counted_in_the_race(
    servers: dict[str, Endpoint], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("k,word\n1,1\n9,1\n")
    (seen,) = HttpProbe().race([servers["picky"]], path, None, duration_s=0.4)
    assert 0 < seen.failed < seen.requests
    assert len(seen.latency_ms) < seen.requests - seen.failed + 1
    assert HttpProbe().race([], path, None, duration_s=0.4) == []


@pytest.mark.parametrize(("a_slice", "slices"), [(1, 10), (150, 3), (400, 2)])
def test_a_busy_machine_is_given_longer_until_there_are_enough_requests_to_bound_a_p99(
    servers: dict[str, Endpoint], rows: Path, monkeypatch: pytest.MonkeyPatch, a_slice: int, slices: int
) -> None:
    alone: list[int] = []

    async def measures(lane: probe_http._Lane, connections: int, length_s: float) -> None:
        if connections == 1:
            alone.append(a_slice)
            lane.latency_ms += [1.0] * a_slice

    monkeypatch.setattr(probe_http._Lane, "slice", measures)
    HttpProbe().race([servers["a"]], rows, "late", duration_s=4 * probe_http._SLICE_S[0])  # two slices, if it is quick
    assert len(alone) == slices


def test_nobody_there_is_told_at_once(rows: Path, tmp_path: Path) -> None:
    for url in (f"unix:{tmp_path}/nobody.sock", "http://127.0.0.1:9"):
        gone = Endpoint("m", "1", url)
        with pytest.raises(PortError, match=r"'m' version 1 at .* is not there"):
            HttpProbe().ask(gone, rows, "late", 10)
        with pytest.raises(PortError, match=r"'m' version 1 at .* is not there"):
            HttpProbe().race([gone], rows, "late", 0.1)
    with pytest.raises(BadInput, match="'ftp://x' is no endpoint"):
        HttpProbe().ask(Endpoint("m", "1", "ftp://x"), rows, "late", 10)


def test_another_model_than_was_meant_and_rows_that_do_not_fit_are_told(
    servers: dict[str, Endpoint], rows: Path
) -> None:
    with pytest.raises(PortError, match="answers 404"):
        HttpProbe().ask(Endpoint("other", "a", servers["a"].url), rows, "late", 10)
    with pytest.raises(BadInput, match="has no label 'delayed'"):
        HttpProbe().ask(servers["a"], rows, "delayed", 10)
    with pytest.raises(BadInput, match="no column for the model's input 'k'"):
        HttpProbe().ask(servers["picky"], rows, "late", 10)
    with pytest.raises(BadInput, match="no output 'q' to take the prediction from; it has: p"):
        HttpProbe().ask(Endpoint("m", "a", servers["a"].url, prediction_output="q"), rows, "late", 10)
    answers = HttpProbe().ask(Endpoint("m", "a", servers["a"].url, prediction_column=4), rows, "late", 1)
    assert answers.failures == ("row 0: output 'p' has 1 columns, and not column 4",)
