"""An alias set with the plain MLflow client is all that a delivery needs; forged hints are refused and counted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import automations
from flows.form import FORM
from flows.story import fold, run_of
from infra.platform_local import running
from infra.router_envoy import EnvoyRouter
from tests.e2e import toy
from tests.e2e.browser import Browser, browser
from tests.e2e.hints import part
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


Ask = Callable[[Platform, Path], tuple[Any, str]]  # MLflow's client, and the version


def registered(platform: Platform, folder: Path) -> tuple[Any, str]:
    """The model, registered as anybody would who does not know lockgate; MLflow's client, and the version."""
    import mlflow
    import onnx

    uri = f"http://127.0.0.1:{platform.ports['MLFLOW']}"
    client = mlflow.MlflowClient(uri, uri)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_experiment("training")
    with mlflow.start_run():
        logged = mlflow.onnx.log_model(onnx.load(folder / "model.onnx"), name="model", pip_requirements=["onnxruntime"])
    return client, str(mlflow.register_model(logged.model_uri, "toy").version)


def ask(platform: Platform, folder: Path) -> tuple[Any, str]:
    """The model, registered, and asked for by the alias."""
    client, version = registered(platform, folder)
    client.set_registered_model_alias("toy", "candidate", version)
    return client, version


def prefect(platform: Platform, *arguments: str) -> None:
    """Prefect's own command line."""
    environment = {**os.environ, "PREFECT_API_URL": f"http://127.0.0.1:{platform.ports['PREFECT']}/api"}
    command = [sys.executable, "-m", "prefect", *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)


def ask_by_hand(platform: Platform, folder: Path) -> tuple[Any, str]:
    """The model, registered, and delivered by Prefect's command line."""
    client, version = registered(platform, folder)
    prefect(platform, "deployment", "run", "deliver/deliver", "-p", "model=toy", "-p", f"version={version}")
    return client, version


def settled(client: Any, version: str) -> dict[str, str]:
    """The version's tags, once the alias has been taken off."""
    wait_until(lambda: "candidate" not in client.get_registered_model("toy").aliases, 240)
    return dict(client.get_model_version("toy", version).tags)


def has_begun(platform: Platform, client: Any, version: str) -> None:
    """Once requests, or copies of them, go to the version."""
    router = EnvoyRouter(platform.home / "agent")

    def begun() -> bool:
        tags = client.get_model_version("toy", version).tags
        assert "lockgate.outcome" not in tags, tags
        return (route := router.current("toy")) is not None and route.candidate == version

    wait_until(begun, 240, "it has begun")


def run_names(platform: Platform) -> list[str]:
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/filter"
    return [run["name"] for run in httpx.post(url, json={}).json() if run["deployment_id"] and "toy" in run["name"]]


def hints(platform: Platform, result: str) -> float:
    """How many hints the receiver has counted with this result."""
    addresses = running(platform.home)
    assert addresses is not None
    counted = httpx.get(addresses.hints.replace("/hints", "/metrics")).text
    return float(counted.split(f'lockgate_hints_total{{result="{result}"}} ')[1].split()[0])


def test_an_alias_is_all_that_a_delivery_needs_and_what_happened_is_told(platform: Platform) -> None:
    client, first = ask(platform, platform.files / "v1")
    assert settled(client, first)["lockgate.outcome"] == "promoted"
    assert hints(platform, "accepted") > 0, "the registry told of it"
    with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST) as traffic:
        client, second = ask(platform, toy.make(platform.files / "v2", seed=2))
        has_begun(platform, client, second)
        for module in ("flows.worker", "flows.receiver"):  # in mid-rollout; its process goes on
            process = part(platform, module)
            assert process is not None
            process.kill()
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


ASKS = """
policy: asks
benchmark: {slo: {latency_ms_p99: 500}, duration: 1s, regression_max: 20}
rollout: {stages: [canary: {weight: 40, for: 2s}], gates: {errors: {margin: 0.1}}, watch: {for: 2s}, burn_in: 1s}
governance: {approvals: {by: [ann, ben], wait: 5m}}
"""


def test_a_person_sees_the_rollout_in_the_ui_and_approves_it_by_mouse(platform: Platform) -> None:
    policy = platform.files / "asks.yaml"
    policy.write_text(ASKS)
    folder = toy.make(platform.files / "v5", seed=5)
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}"
    with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST), ThreadPoolExecutor() as pool, browser() as person:
        delivery = pool.submit(platform.deliver, folder, policy=policy)
        wait_until(lambda: bool(forms(platform)), 180, "people are asked")
        ((form, name),) = forms(platform).items()
        version = name.split()[1].removeprefix("v").removesuffix(":")
        book = platform.ledger()
        try:
            rollout = book.rollouts("toy")[0]
            run = run_of(book.read(rollout))
            person.opens(f"{url}/runs/flow-run/{run}", f"toy v{version} → local: canary 40 %, waiting for approval")
            person.clicks("Artifacts")
            person.reads("toy-progress", "toy-rollout", "toy-stages")
            person.keeps("run")
            seen = httpx.post(f"{url}/api/artifacts/filter", json={"flow_runs": {"id": {"any_": [run]}}}).json()
            at = {each["key"]: f"{url}/artifacts/artifact/{each['id']}" for each in seen}
            expected = {
                "toy-progress": ["Progress: "],
                "toy-rollout": [f"toy v{version} → local", "People are asked.", "live traffic", "Gates", "errors"],
                "toy-stages": ["Items", "canary 40 %", "verdict"],
            }
            for key, words in expected.items():
                person.opens(at[key], *words)
                person.keeps(key)
            person.opens(f"{url}/runs/flow-run/{form}", name)
            person.clicks("Resume")
            person.reads(f"May toy v{version} go on to promotion?", "It needs 1 of ann, ben.")
            person.chooses(0, "approve")
            person.chooses(1, "ann")
            person.types(0, "seen by the desk")
            person.types(1, "CHG-42")
            person.keeps("form")
            submit(person)
            outcome = delivery.result(180)
            assert (outcome.code, outcome.json["outcome"]) == (0, "promoted"), outcome.err + outcome.out
            (answer,) = [entry for entry in book.read(rollout) if entry.kind == "answered"]
        finally:
            book.close()
        assert (answer.actor, answer.body["ticket"]) == ("ann (Prefect form)", "CHG-42")
        person.opens(f"{url}/runs/flow-run/{run}", f"toy v{version} → local: promoted")
        person.keeps("promoted")


def submit(person: Browser) -> None:
    """By mouse, and once more where the UI says that it failed: Prefect's SQLite does not let one wait for its turn."""
    for _ in range(5):
        person.clicks("Submit", within="[role=dialog]")
        wait_until(lambda: "Flow run resumed" in person.says() or "Failed to resume" in person.says(), 60, "an answer")
        person.keeps("submitted")
        if "Flow run resumed" in person.says():
            return
        print("the UI said: Failed to resume flow run")
        wait_until(lambda: "Failed to resume" not in person.says(), 60, "the message is gone")
    pytest.fail("the form was not taken in five tries")


def forms(platform: Platform) -> dict[str, str]:
    """The runs that wait for an answer of people: the name of each, by its id."""
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/filter"
    asked = {"tags": {"all_": [FORM]}, "state": {"type": {"any_": ["PAUSED"]}}}
    return {run["id"]: run["name"] for run in httpx.post(url, json={"flow_runs": asked}).json()}


def states(platform: Platform) -> dict[str, str]:
    """Of the runs of deliveries: the state type of each, by the run's id."""
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/filter"
    found = httpx.post(url, json={"flow_runs": {"tags": {"all_": ["lockgate"]}}}).json()
    return {run["id"]: run["state_type"] for run in found if "toy" in run["name"]}


def in_shadow(platform: Platform, seed: int, ask: Ask = ask) -> tuple[Any, str, str]:
    """A version that waits in its shadow stage, for want of traffic: MLflow's client, its number, its run's id."""
    before = states(platform)
    client, version = ask(platform, toy.make(platform.files / f"v{seed}", seed=seed))
    has_begun(platform, client, version)
    run = next(name for name in states(platform) if name not in before)
    return client, version, run


def test_who_cancels_the_flow_run_takes_the_traffic_back(platform: Platform) -> None:
    client, version, run = in_shadow(platform, 11, ask_by_hand)
    prefect(platform, "flow-run", "cancel", run)
    wait_until(lambda: outcome_of(platform, version) == "rolled back: abort ordered: its flow run was cancelled", 60)
    wait_until(lambda: states(platform)[run] == "CANCELLED", 60)
    wait_until(lambda: any(line.startswith("cancelled: ") for line in said(platform, run)), 30, "the hook")
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/{run}"
    wait_until(lambda: httpx.get(url).json()["name"].endswith("rolled back"), 30, "the run's name")
    wait_until(lambda: "lockgate.outcome" in client.get_model_version("toy", version).tags, 30, "the registry is told")
    assert client.get_model_version("toy", version).tags["lockgate.outcome"] == "rolled_back"


def test_worker_and_delivery_killed_together_leave_no_run_that_nobody_ends(platform: Platform) -> None:
    client, version, run = in_shadow(platform, 12)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ends just now, or is somebody else's
            ours = {"flows.worker", "prefect.engine"} & {*process.cmdline()}
            if ours and process.environ().get("LOCKGATE_HOME") == str(platform.home):
                process.kill()
    with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST) as traffic:
        assert settled(client, version)["lockgate.outcome"] in ("promoted", "rolled_back")
        wait_until(lambda: states(platform)[run] == "CRASHED", 60)
    assert traffic.failed() == []
    wait_until(lambda: reconciled_after(platform, run) == ["COMPLETED"], 60, "the automation of a crash")


def said(platform: Platform, run: str) -> list[str]:
    """The lines of the run's log."""
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/logs/filter"
    return [line["message"] for line in httpx.post(url, json={"logs": {"flow_run_id": {"any_": [run]}}}).json()]


def reconciled_after(platform: Platform, run: str) -> list[str]:
    """The states of the runs of `reconcile` that were asked for after the run's crash."""
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/filter"
    found = httpx.post(url, json={"sort": "ID_DESC"}).json()
    return [each["state_type"] for each in found if each["parameters"].get("crashed") == run]


def test_the_automations_are_there_once_and_stay_as_somebody_left_them(platform: Platform) -> None:
    api = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/automations"

    def there() -> dict[str, dict[str, Any]]:
        found = httpx.post(f"{api}/filter", json={}).json()
        assert sorted(each["name"] for each in found) == [automations.CRASHED, automations.ALARM]
        return {each["name"]: each for each in found}

    def put(automation: Mapping[str, Any]) -> None:
        body = {key: value for key, value in automation.items() if key not in ("id", "created", "updated")}
        wait_until(lambda: httpx.put(f"{api}/{automation['id']}", json=body).is_success, 60, "SQLite's turn")

    made = there()[automations.CRASHED]
    (run,) = made["actions"]
    gone = {**run, "deployment_id": str(uuid.uuid4()), "parameters": {"crashed": "as somebody likes it"}}
    try:
        put({**made, "enabled": False, "description": "ours, too", "actions": [gone]})
        subprocess.run(
            [sys.executable, "-c", "from flows import automations; automations.apply()"],  # as the worker does
            env={**os.environ, "PREFECT_API_URL": api.removesuffix("/automations")},
            check=True,
            timeout=60,
        )
        seen = there()[automations.CRASHED]
        assert (seen["enabled"], seen["description"]) == (False, "ours, too")
        assert seen["actions"] == [{**gone, "deployment_id": run["deployment_id"]}]
    finally:
        put(made)


def outcome_of(platform: Platform, version: str) -> str:
    """How the ledger says that the version's newest rollout stands."""
    book = platform.ledger()
    try:
        found = (fold(book.read(name)) for name in book.rollouts("toy"))
        state = next(state for state in found if state is not None and state.candidate == version)
        return f"{state.phase}: {state.reason}"
    finally:
        book.close()


def test_forged_hints_are_refused_and_counted(platform: Platform) -> None:
    addresses = running(platform.home)
    assert addresses is not None
    before = hints(platform, "forged")
    forged = {"X-MLflow-Delivery-Id": "d", "X-MLflow-Timestamp": str(int(time.time())), "X-MLflow-Signature": "v1,x"}
    assert httpx.post(addresses.hints, headers=forged, content=b"{}").status_code == 401
    assert hints(platform, "forged") == before + 1
