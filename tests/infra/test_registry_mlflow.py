"""The MLflow registry keeps the port's contract on a real server, and every failure has its sentence."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from infra.registry_mlflow import MlflowRegistry
from tasks.ports import BadInput, ModelVersion, NotThere, PortError, Refused, Submission
from tests.infra.onnx_models import logistic, save
from tests.ports.registry_contract import MakeModel, RegistryContract

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # MLflow's own, of many kinds; none is about what we call


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[str]:
    """A real MLflow server on SQLite."""
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "files")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    with (store / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=log, stderr=log)
    try:
        yield _answering(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _answering(uri: str, process: subprocess.Popen[bytes], within_s: float = 90.0) -> str:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1):
                return uri
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the MLflow server did not come up (code {process.poll()})")


@pytest.fixture
def registry(server: str, tmp_path: Path) -> MlflowRegistry:
    return MlflowRegistry(server, tmp_path / "cache")


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    return lambda seed: save(logistic((float(seed), -1.0)), tmp_path / f"model-{seed}.onnx")


@pytest.mark.e2e
class TestMlflowRegistry(RegistryContract):
    @pytest.fixture
    def damage(self, store: Path) -> Callable[[ModelVersion], None]:
        def damage(version: ModelVersion) -> None:
            for file in (store / "files").rglob(f"{version.run_id}/artifacts/model/model.onnx"):
                file.write_bytes(b"something else")

        return damage

    def test_the_same_bytes_registered_by_several_at_once_are_one_version_in_the_end(
        self, server: str, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        onnx = str(make_model(1))

        def register(number: int) -> ModelVersion:
            return MlflowRegistry(server, tmp_path / f"cache-{number}").register(Submission(name, onnx))

        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(register, range(4)))
        left = MlflowRegistry(server, tmp_path / "cache").versions(name)
        assert {version.version for version in made} == {version.version for version in left}
        assert len(left) == 1

    def test_standard_output_is_left_to_the_command_line(
        self, registry: MlflowRegistry, make_model: MakeModel, name: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        made = registry.register(Submission(name, str(make_model(1))))
        registry.record(made, {"a": 1.0})
        assert capfd.readouterr().out == ""

    def test_plain_mlflow_clients_load_the_model_and_find_signature_and_example(
        self, server: str, registry: MlflowRegistry, make_model: MakeModel, name: str
    ) -> None:
        import mlflow

        registry.register(Submission(name, str(make_model(1)), metrics={"auc": 0.75}))
        mlflow.set_tracking_uri(server)
        loaded = mlflow.pyfunc.load_model(f"models:/{name}/1")
        answer: Any = loaded.predict({"x": np.array([[1.0, 1.0]], dtype="float32")})
        assert answer["p"].tolist() == [[0.5]]
        assert loaded.metadata.signature.inputs.input_names() == ["x"]
        assert loaded.metadata.saved_input_example_info is not None
        assert mlflow.get_run(registry.version(name, "1").run_id).data.metrics == {"auc": 0.75}

    def test_a_version_of_somebody_else_is_adopted_under_its_own_number_with_its_weights_in_one_file(
        self, server: str, registry: MlflowRegistry, name: str
    ) -> None:
        import mlflow

        mlflow.set_tracking_uri(server)
        with mlflow.start_run() as run:  # tensors beyond 1 kB go to files of their own, MLflow's default
            mlflow.onnx.log_model(_wide(), name="model", registered_model_name=name, pip_requirements=["onnxruntime"])
        assert registry.versions(name) == []
        adopted = registry.version(name, "1")
        assert adopted.version == "1"
        assert registry.register(Submission(name, f"models:/{name}/1")).digest == adopted.digest
        assert registry.register(Submission(name, f"runs:/{run.info.run_id}/model")).version == "1"
        whole = onnx.load(registry.fetch(adopted).onnx, load_external_data=False)
        assert not whole.graph.initializer[0].external_data
        assert [v.version for v in registry.versions(name)] == ["1"]

    def test_what_is_in_the_cache_is_given_without_the_server(
        self, registry: MlflowRegistry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        made = registry.register(Submission(name, str(make_model(1))))
        first = registry.fetch(made)
        alone = MlflowRegistry(f"http://127.0.0.1:{_free_port()}", tmp_path / "cache")
        assert alone.fetch(made) == first

    def test_expected_answers_without_the_models_inputs_or_a_prediction_are_refused_at_once(
        self, registry: MlflowRegistry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "expected.csv"
        for text, says in (
            ("x.0,x.1,predicted\n1,2,3\n", "did you mean 'predicted'"),
            ("a,prediction\n1,2\n", "takes 2"),
        ):
            path.write_text(text)
            with pytest.raises(BadInput, match=f"expected.csv.*{says}"):
                registry.register(Submission(name, str(make_model(1)), expected=path))
        assert registry.versions(name) == []

    def test_a_model_of_another_flavour_is_named_as_such(
        self, server: str, registry: MlflowRegistry, name: str
    ) -> None:
        import mlflow

        mlflow.set_tracking_uri(server)
        with mlflow.start_run():
            mlflow.pyfunc.log_model(
                name="model",
                python_model=lambda model_input: model_input,
                registered_model_name=name,
                pip_requirements=[],
            )
        with pytest.raises(BadInput, match=r"python_function flavour, not of mlflow\.onnx"):
            registry.version(name, "1")

    def test_a_full_disk_has_its_own_sentence(
        self, registry: MlflowRegistry, make_model: MakeModel, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = registry.register(Submission(name, str(make_model(1))))

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(PortError, match=r"no space left in .*cache"):
            registry.fetch(made)


def _wide() -> Any:
    model = logistic()
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((2, 400), dtype="float32"), "w"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 400
    return model


def test_a_server_that_is_not_there_is_told_within_seconds(make_model: MakeModel, tmp_path: Path) -> None:
    registry = MlflowRegistry(f"http://127.0.0.1:{_free_port()}", tmp_path / "cache")
    registry._client  # noqa: B018 - MLflow's import is not what is timed
    started = time.monotonic()
    calls: tuple[Callable[[], object], ...] = (
        lambda: registry.register(Submission("m", str(make_model(1)))),
        lambda: registry.version("m", "1"),
        lambda: registry.by_alias("m", "champion"),
        lambda: registry.versions("m"),
        lambda: registry.set_alias("m", "champion", None),
        lambda: registry.tag("m", "1", {"a": "b"}),
    )
    for call in calls:
        with pytest.raises(PortError, match=r"the registry at http://127\.0\.0\.1:\d+ does not answer") as caught:
            call()
        assert type(caught.value) is PortError
    assert time.monotonic() - started < 60, "retries or timeouts are not bounded"


def test_every_error_of_mlflow_requests_and_the_disk_has_a_place_in_the_ports_tree(tmp_path: Path) -> None:
    import requests
    import urllib3
    from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    registry = MlflowRegistry("http://127.0.0.1:1", tmp_path)
    special = {
        "RESOURCE_DOES_NOT_EXIST": NotThere,
        "NOT_FOUND": NotThere,
        "PERMISSION_DENIED": Refused,
        "UNAUTHENTICATED": Refused,
        "CUSTOMER_UNAUTHORIZED": Refused,
        "INVALID_PARAMETER_VALUE": BadInput,
        "BAD_REQUEST": BadInput,
    }
    vendors: list[tuple[Exception, type[PortError]]] = [
        (MlflowException("why", error_code=ErrorCode.Value(code)), special.get(code, PortError))
        for code in ERROR_CODE_TO_HTTP_STATUS
    ]
    vendors += [
        (requests.ConnectionError("why"), PortError),
        (requests.Timeout("why"), PortError),
        (urllib3.exceptions.ProtocolError("why"), PortError),
        (OSError(errno.EACCES, "why"), PortError),
    ]
    for vendor, ours in vendors:
        with pytest.raises(PortError, match=r"could not look: .*why") as caught, registry._asking("look"):
            raise vendor
        assert type(caught.value) is ours, vendor
    shutil.rmtree(tmp_path)
