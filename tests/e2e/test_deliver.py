"""A newcomer's own model through the real platform: Prefect, MLflow, Envoy, model servers, started by `lockgate up`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from flows.planning import MEASURED_S
from flows.story import fold
from tests.e2e import toy
from tests.e2e.running_platform import Clients, Platform, running_platform, wait_until
from tests.serving.keys import pem, sign

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    files = tmp_path_factory.mktemp("files")
    (files / "toy.yaml").write_text(toy.POLICY)
    with running_platform(tmp_path_factory.mktemp("home"), files) as made:
        yield made


def predict(platform: Platform) -> httpx.Response:
    url = f"http://127.0.0.1:{platform.ports['GATEWAY']}/v2/models/toy/infer"
    return httpx.post(url, json={"inputs": [toy.REQUEST]}, timeout=10)


def clients(platform: Platform) -> Clients:
    return Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST)


@pytest.fixture(scope="module")
def first(platform: Platform) -> Path:
    """The first version, delivered."""
    folder = toy.make(platform.files / "v1", seed=1)
    run = platform.deliver(folder, "--expected", folder / "expected.csv")
    assert run.code == 0, run.err + run.out
    assert run.json["outcome"] == "promoted"
    return folder


def test_a_first_version_serves_through_the_gateway_and_is_the_champion(platform: Platform, first: Path) -> None:
    assert predict(platform).status_code == 200
    seen = platform.lockgate("status", "--json").json["models"]
    assert [(each["model"], each["champion"], each["traffic"]) for each in seen] == [("toy", "1", "v1 100 %")]


def test_a_second_version_climbs_under_live_traffic_without_a_failed_request(platform: Platform, first: Path) -> None:
    """It is signed, as its policy asks; before that it is not let in."""
    folder = toy.make(platform.files / "v2", seed=2)
    key = ec.generate_private_key(ec.SECP256R1())
    policy = platform.files / "signed.yaml"
    policy.write_text(f"{toy.POLICY}governance: {{signed_by: [{json.dumps(pem(key))}]}}\n")
    run = platform.deliver(folder, policy=policy)
    assert (run.code, "toy v2 is not signed, and the policy asks for it" in run.err) == (1, True), run.err
    (folder / "model.onnx.sig").write_text(sign(key, (folder / "model.onnx").read_bytes()))
    with clients(platform) as traffic:
        run = platform.deliver(folder, "--expected", folder / "expected.csv", "--reason", "the second", policy=policy)
    assert run.code == 0, run.err + run.out
    assert run.json["version"] == "2"
    assert run.json["candidate_requests"] > 0
    assert (traffic.failed(), traffic.served()) == ([], {"1", "2"})
    assert len(traffic.answers) > 100
    assert predict(platform).headers["x-lockgate-version"] == "2"


def test_prefect_shows_the_run_its_progress_and_the_gates(platform: Platform, first: Path) -> None:
    api = f"http://127.0.0.1:{platform.ports['PREFECT']}/api"
    names = {run["name"] for run in httpx.post(f"{api}/flow_runs/filter", json={}).json()}
    assert "toy v2 → local: promoted" in names
    kinds = {(each["key"], each["type"]) for each in httpx.post(f"{api}/artifacts/filter", json={}).json()}
    shown = {
        ("toy-progress", "progress"),
        ("toy-rollout", "markdown"),
        ("toy-stages", "table"),
        ("toy-report", "markdown"),
    }
    assert shown <= kinds


def test_the_report_is_kept_with_the_versions_run(platform: Platform, first: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"http://127.0.0.1:{platform.ports['MLFLOW']}")
    version = client.get_model_version_by_alias("toy", "champion")
    run = version.tags["lockgate.run"]
    pages = [item.path for item in client.list_artifacts(run, "lockgate/reports") if item.path.endswith(".html")]
    assert pages
    assert version.tags["lockgate.outcome"] == "promoted"


def test_rollback_brings_the_former_version_back(platform: Platform, first: Path) -> None:
    run = platform.lockgate("rollback", "toy", "--reason", "complaints", "--json")
    assert run.code == 0, run.err + run.out
    assert predict(platform).headers["x-lockgate-version"] == "1"
    seen = platform.lockgate("status", "--json").json["models"][0]
    assert (seen["champion"], seen["traffic"]) == ("1", "v1 100 %")


@pytest.fixture(scope="module")
def bad(platform: Platform, first: Path) -> dict[str, Any]:
    """Arguments that cannot be delivered, by what is wrong with them."""
    files = platform.files
    corrupt = files / "corrupt"
    corrupt.mkdir()
    (corrupt / "model.onnx").write_bytes((first / "model.onnx").read_bytes()[:-40])
    other = toy.make(files / "other", columns=("a", "b"))
    unlabelled = toy.make(files / "unlabelled", seed=5, label="labels")
    unknown_key = files / "unknown.yaml"
    unknown_key.write_text(toy.POLICY.replace("margin", "margn"))
    common = ("--policy", files / "toy.yaml")
    rows = ("--validation", first / "validation.csv")
    return {
        "missing file": (("--file", files / "nowhere.onnx", *common, *rows), "nowhere.onnx"),
        "corrupt file": (("--file", corrupt / "model.onnx", *common, *rows), "corrupt/model.onnx"),
        "other signature": (("--file", other / "model.onnx", *common, "--validation", other / "validation.csv"), "'X'"),
        "unknown version": (("--version", "99", *common, *rows), "99"),
        "unknown run": (("--source", "runs:/0123456789abcdef0123456789abcdef/model", *common, *rows), "0123456789ab"),
        "no label": (
            ("--file", first / "model.onnx", *common, "--validation", unlabelled / "validation.csv"),
            "labels",
        ),
        "unknown key": (("--file", first / "model.onnx", "--policy", unknown_key, *rows), "did you mean 'margin'"),
        "the champion's bytes": (("--file", first / "model.onnx", *common, *rows), "champion already"),
        "two sources": (("--file", first / "model.onnx", "--version", "1", *common, *rows), "exactly one"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "missing file",
        "corrupt file",
        "other signature",
        "unknown version",
        "unknown run",
        "no label",
        "unknown key",
        "the champion's bytes",
        "two sources",
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_changes_nothing(
    platform: Platform, bad: dict[str, Any], what: str
) -> None:
    arguments, word = bad[what]
    before = (platform.versions(), platform.lockgate("status", "--json").json["models"])
    run = platform.lockgate("deliver", "toy", *arguments)
    assert run.code == 2, run.err + run.out
    assert word in run.err
    assert "Traceback" not in run.err
    assert len(run.err.strip().splitlines()) == 1, run.err
    assert (platform.versions(), platform.lockgate("status", "--json").json["models"]) == before


def test_an_unreachable_registry_is_exit_code_3(platform: Platform, first: Path) -> None:
    folder = toy.make(platform.files / "v9", seed=9)
    run = platform.deliver(folder, LOCKGATE_MLFLOW_URL="http://127.0.0.1:9")
    assert run.code == 3, run.err + run.out
    assert "127.0.0.1:9" in run.err
    assert "Traceback" not in run.err


def test_a_busy_port_is_told_with_the_option_that_mends_it(platform: Platform, tmp_path: Path) -> None:
    run = platform.lockgate("up", LOCKGATE_HOME=str(tmp_path / "second"))
    assert run.code == 2
    assert "--prefect-port" in run.err


def test_without_a_platform_the_command_says_how_to_start_one(platform: Platform, tmp_path: Path) -> None:
    run = platform.lockgate("status", LOCKGATE_HOME=str(tmp_path / "nothing"))
    assert run.code == 3
    assert "lockgate up" in run.err


def test_a_delivery_whose_process_is_killed_in_mid_canary_ends_all_the_same(platform: Platform, first: Path) -> None:
    """kill -9 of the controller: the reconciler goes on, or takes the traffic back; no request fails."""
    folder = toy.make(platform.files / "v7", seed=7)
    files = ("--file", folder / "model.onnx", "--validation", folder / "validation.csv")
    command = [sys.executable, "-m", "flows.cli", "deliver", "toy", *files, "--policy", platform.files / "toy.yaml"]
    with clients(platform) as traffic:
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **platform.env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: state_of(platform).startswith("canary"), 120)
        process.kill()
        process.wait(30)
        wait_until(lambda: state_of(platform) in ("promoted", "rolled back"), 120)
    assert traffic.failed() == []
    serving = predict(platform).headers["x-lockgate-version"]
    seen = platform.lockgate("status", "--json").json["models"][0]
    assert seen["traffic"] == f"v{serving} 100 %"
    assert seen["champion"] == serving
    assert platform.lockgate("audit", "verify").code == 0
    assert platform.lockgate("audit", "replay", seen["rollout"]).code == 0


def state_of(platform: Platform) -> str:
    """Where the newest rollout stands, from the ledger: a command would take longer than a stage."""
    ledger = platform.ledger()
    try:
        state = fold(ledger.read(ledger.rollouts("toy")[0]))
    finally:
        ledger.close()
    return state.label if state else ""


# ---------------------------------------------------------------- labels


class LabelledClients:
    """Clients whose requests differ, bear an id and have a truth, which `lockgate labels` brings a moment later."""

    def __init__(self, platform: Platform) -> None:
        self.platform, self.asked = platform, 0
        self.times: list[float] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._truth: dict[str, int] = {}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._tell)]

    def __enter__(self) -> LabelledClients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        random = np.random.default_rng()
        url = f"http://127.0.0.1:{self.platform.ports['GATEWAY']}/v2/models/toy/infer"
        prefix = f"order-{random.integers(10**9)}"
        with httpx.Client(timeout=10) as client:
            while not self._stop.is_set():
                row = random.normal(size=4)
                truth = int(row[0] - row[1] + random.normal() > 0)  # as `toy.make` has it
                name = f"{prefix}-{self.asked}"
                body = {"inputs": [{**toy.REQUEST, "data": row.tolist()}]}
                answer = client.post(url, json=body, headers={"x-request-id": name})
                if answer.status_code != 200:
                    self.failures.append(answer.text)
                self._truth[name] = truth
                self.asked += 1
                self.times.append(time.monotonic())
                time.sleep(0.015)

    def _tell(self) -> None:
        file = self.platform.files / "outcomes.csv"
        while not self._stop.wait(1.0):
            told = list(self._truth)
            file.write_text("\n".join(["request_id,label", *(f"{name},{self._truth.pop(name)}" for name in told)]))
            done = self.platform.lockgate("labels", "toy", file)
            if done.code != 0:
                self.failures.append(done.err)


LABELLED = toy.POLICY.replace("policy: toy", "policy: labelled").replace("patience: 60s", "patience: 120s")
LABELLED = LABELLED.replace("errors: {margin: 0.1}", "errors: {margin: 0.1}\n    quality: {margin: 0.1, rows_min: 50}")


def quality_in(platform: Platform, rollout: str) -> list[dict[str, Any]]:
    """What the quality gate said at the decisions, from `lockgate explain`."""
    decisions = platform.lockgate("explain", rollout, "--json").json["decisions"]
    looks = [each for each in decisions if each["kind"] == "looked"]
    return [report for each in looks for report in each["reports"] if report["gate"] == "quality"]


def test_a_plan_at_measured_traffic_has_the_traffics_figures(platform: Platform, first: Path) -> None:
    with LabelledClients(platform) as traffic:
        wait_until(lambda: traffic.asked > 50, 60)
        began = time.monotonic()
        run = platform.lockgate("plan", platform.files / "toy.yaml", "--measured", "toy", "--json")
        times = np.array([at for at in traffic.times if at >= began])
    # It measures for ten seconds, which of the command's is not said; a busy machine's traffic is not steady.
    starts = times[times <= times[-1] - MEASURED_S]
    rates = (np.searchsorted(times, starts + MEASURED_S) - np.searchsorted(times, starts)) / MEASURED_S
    assert run.code in (0, 2), run.err
    assert traffic.failures == []
    assert 0.9 * rates.min() <= run.json["traffic"]["rps"] <= 1.1 * rates.max()
    assert run.json["traffic"]["error_rate"] < 0.05
    requests = {stage["name"]: stage["requests"] for stage in run.json["stages"]}
    assert requests["canary 40 %"] == pytest.approx(run.json["traffic"]["rps"] * 0.4 * 4, abs=1)


def test_labels_of_answers_through_the_gateway_promote_a_good_version(platform: Platform, first: Path) -> None:
    policy = platform.files / "labelled.yaml"
    policy.write_text(LABELLED)
    with LabelledClients(platform) as traffic:
        run = platform.deliver(toy.make(platform.files / "v11", seed=11), policy=policy)
    assert run.code == 0, run.err + run.out
    assert traffic.failures == []
    passed = [report for report in quality_in(platform, run.json["rollout"]) if report["verdict"] == "pass"]
    assert passed, "the last stage is passed on labels"
    assert 50 <= passed[-1]["n"] <= traffic.asked


def test_a_version_that_only_labels_can_tell_is_taken_back_and_evidentlys_page_is_kept(
    platform: Platform, first: Path
) -> None:
    """Its predictions are the stable version's, turned over: equally distributed, and right by its own validation."""
    folder = toy.make(platform.files / "v12", seed=12, flipped=True)
    rows = (folder / "validation.csv").read_text().splitlines()
    turned = [rows[0], *(f"{row.rpartition(',')[0]},{1 - int(float(row.rpartition(',')[2]))}" for row in rows[1:])]
    (folder / "validation.csv").write_text("\n".join(turned) + "\n")
    policy = platform.files / "drift.yaml"
    policy.write_text(LABELLED.replace("  gates:\n", "  gates:\n    drift: {threshold: 0.5, rows_min: 100}\n"))
    with LabelledClients(platform) as traffic:
        run = platform.deliver(folder, policy=policy)
    assert run.code == 1, run.err + run.out
    assert run.json["reason"].startswith("quality: "), run.json["reason"]
    assert traffic.failures == []
    assert quality_in(platform, run.json["rollout"])[-1]["nearest"]
    pages = platform.lockgate("explain", run.json["rollout"], "--json").json["pages"]
    assert pages, "the stage in which it failed has a page"
    import mlflow

    client = mlflow.MlflowClient(f"http://127.0.0.1:{platform.ports['MLFLOW']}")
    version = client.get_model_version("toy", run.json["version"])
    kept = {Path(item.path).name for item in client.list_artifacts(version.tags["lockgate.run"], "lockgate/reports")}
    assert pages[-1]["error"] == ""
    page = pages[-1]["link"].rpartition("/")[2]
    assert page in kept
    assert f"{run.json['rollout']}.html" in kept
    report = client.download_artifacts(version.tags["lockgate.run"], f"lockgate/reports/{run.json['rollout']}.html")
    assert pages[-1]["link"] in Path(report).read_text()
    text = Path(client.download_artifacts(version.tags["lockgate.run"], f"lockgate/reports/{page}")).read_text()
    assert "prediction" in text
