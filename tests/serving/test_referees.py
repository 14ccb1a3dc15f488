"""Others' clients and others' judges: Triton's client, and schemathesis against the server's own description."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.serving import models
from tests.serving.running_server import RunningServer, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def client():
    pytest.importorskip("gevent")
    import tritonclient.http as triton

    made = []

    def connect(server: RunningServer):
        made.append(triton.InferenceServerClient(server.url.removeprefix("http://")))
        return made[-1]

    yield connect
    for one in made:
        one.close()


@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_infers_in_json_and_in_raw_bytes(tmp_path: Path, client, binary: bool) -> None:
    import tritonclient.http as triton

    models.two_inputs(tmp_path / "m.onnx")
    rows = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    names = np.array(["", "ü", "x" * 300, "b", "c"], dtype=object)
    with running(tmp_path / "m.onnx") as server:
        peer = client(server)
        inputs = [triton.InferInput("a", rows.shape, "FP32"), triton.InferInput("s", names.shape, "BYTES")]
        inputs[0].set_data_from_numpy(rows, binary_data=binary)
        inputs[1].set_data_from_numpy(names, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("same", "total")]
        for compression in (None, "gzip", "deflate"):
            given = peer.infer("m", inputs, outputs=outputs, request_id="r", request_compression_algorithm=compression)
            np.testing.assert_allclose(given.as_numpy("total"), rows.sum(axis=1), rtol=1e-5)
            same = [text.decode() if isinstance(text, bytes) else text for text in given.as_numpy("same")]
            assert same == names.tolist()
            assert given.get_response()["id"] == "r"


def test_triton_s_client_reads_health_metadata_and_statistics(tmp_path: Path, client) -> None:
    models.score(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx", version="4") as server:
        peer = client(server)
        assert peer.is_server_live()
        assert peer.is_server_ready()
        assert peer.is_model_ready("m", "4")
        assert not peer.is_model_ready("other")
        assert peer.get_model_metadata("m")["inputs"] == [{"name": "f", "datatype": "FP32", "shape": [-1, 4]}]
        assert "binary_tensor_data" in peer.get_server_metadata()["extensions"]
        assert peer.get_inference_statistics("m")["model_stats"][0]["inference_count"] == 0


def test_triton_s_client_is_told_what_is_wrong(tmp_path: Path, client) -> None:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    models.score(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx") as server:
        wrong = triton.InferInput("f", [1, 3], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
        with pytest.raises(InferenceServerException, match=r"input 'f': expected shape \[-1, 4\], got shape \[1, 3\]"):
            client(server).infer("m", [wrong])


@pytest.mark.e2e
def test_schemathesis_finds_nothing_against_the_server_s_own_description(tmp_path: Path) -> None:
    """All checks but one: that every body of the right form is accepted, which JSON Schema cannot say of tensors."""
    models.score(tmp_path / "m.onnx")
    with running(tmp_path / "m.onnx") as server:
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            "run",
            f"{server.url}/openapi.json",
            "--seed",
            "1",
        ]
        command += ["--max-examples", "25", "--exclude-checks", "positive_data_acceptance"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout[-5000:]
        assert server.stop() == (0, "")
