"""An alias set with the plain MLflow client is all that a delivery needs; forged hints are refused and counted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.platform_local import running
from tests.e2e import toy
from tests.e2e.running_platform import Clients, Platform, running_platform, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::Warning")]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    files, home = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("home")
    rows = toy.make(files / "v1", seed=1) / "validation.csv"
    (home / "policies").mkdir()
    (home / "policies" / "toy.yaml").write_text(f"model: toy\nvalidate: {{rows: {rows}}}\n" + toy.POLICY)
    with running_platform(home, files) as made:
        yield made


def ask(platform: Platform, folder: Path) -> tuple[Any, str]:
    """Registers the model and sets the alias, as anybody would who does not know lockgate; client and version."""
    import mlflow
    import onnx

    uri = f"http://127.0.0.1:{platform.ports['MLFLOW']}"
    client = mlflow.MlflowClient(uri, uri)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_experiment("training")
    with mlflow.start_run():
        logged = mlflow.onnx.log_model(onnx.load(folder / "model.onnx"), name="model", pip_requirements=["onnxruntime"])
    version = mlflow.register_model(logged.model_uri, "toy").version
    client.set_registered_model_alias("toy", "candidate", version)
    return client, str(version)


def settled(client: Any, version: str) -> dict[str, str]:
    """The version's tags, once the alias has been taken off."""
    wait_until(lambda: "candidate" not in client.get_registered_model("toy").aliases, 240)
    return dict(client.get_model_version("toy", version).tags)


def run_names(platform: Platform) -> list[str]:
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/filter"
    return [run["name"] for run in httpx.post(url, json={}).json() if run["deployment_id"] and "toy" in run["name"]]


def test_an_alias_is_all_that_a_delivery_needs_and_what_happened_is_told(platform: Platform) -> None:
    client, first = ask(platform, platform.files / "v1")
    assert settled(client, first)["lockgate.outcome"] == "promoted"
    with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST) as traffic:
        client, second = ask(platform, toy.make(platform.files / "v2", seed=2))
        assert settled(client, second)["lockgate.outcome"] == "promoted"
        assert client.get_registered_model("toy").aliases == {"champion": second, "previous": first}
        # Its answers are those of another task: the checks refuse it.
        client, bad = ask(platform, toy.make(platform.files / "bad", seed=3, flipped=True))
        tags = settled(client, bad)
        assert tags["lockgate.outcome"] == "refused", tags
        assert "quality" in tags["lockgate.reason"]
    assert client.get_registered_model("toy").aliases["champion"] == second
    assert traffic.failed() == []
    wait_until(
        lambda: (
            sorted(run_names(platform))
            == sorted(
                [f"toy v{first} → local: promoted", f"toy v{second} → local: promoted", f"toy v{bad} → local: refused"]
            )
        ),
        30,
    )  # each once


def test_forged_hints_are_refused_and_counted_and_true_ones_were_believed(platform: Platform) -> None:
    addresses = running(platform.home)
    assert addresses is not None
    forged = {"X-MLflow-Delivery-Id": "d", "X-MLflow-Timestamp": str(int(time.time())), "X-MLflow-Signature": "v1,x"}
    assert httpx.post(addresses.hints, headers=forged, content=b"{}").status_code == 401
    counted = httpx.get(addresses.hints.replace("/hints", "/metrics")).text
    assert 'lockgate_hints_total{result="forged"} 1.0' in counted
    assert 'lockgate_hints_total{result="accepted"} 0.0' not in counted
