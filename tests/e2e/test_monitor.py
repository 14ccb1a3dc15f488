"""What serves is looked at by the clock, on the real platform: `lockgate up` with its worker, schedule and UIs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e import toy
from tests.e2e.running_platform import Platform, free_port, running_platform, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]
PERIOD_S = 30.0
POLICY = f"""{toy.POLICY}
monitor:
  every: 30s
  false_alarms_per_year: 12
  drift: {{threshold: 0.2, rows_min: 300}}
  retrain: {{deployment: reconcile/reconcile, parameters: {{at_once: false}}}}
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    files, home = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("home")
    (files / "toy.yaml").write_text(POLICY)
    evidently = free_port()
    more = {"LOCKGATE_EVIDENTLY_PORT": str(evidently), "LOCKGATE_MONITOR_CRON": "* * * * *"}
    with running_platform(home, files, **more) as made:
        made.ports["EVIDENTLY"] = evidently
        run = made.deliver(toy.make(files / "v1"))
        assert run.code == 0, run.err + run.out
        yield made


class Traffic:
    """Batches of rows from a distribution that the test can shift."""

    def __init__(self, platform: Platform) -> None:
        self.url = f"http://127.0.0.1:{platform.ports['GATEWAY']}/v2/models/toy/infer"
        self.shift, self.sent = 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _work(self) -> None:
        generator = np.random.default_rng(11)
        with httpx.Client(timeout=10) as client:
            while not self._stop.is_set():
                x = generator.normal(size=(4, 4))
                x[:, 2] += self.shift
                body = {"name": "X", "datatype": "FP32", "shape": [4, 4], "data": x.ravel().tolist()}
                assert client.post(self.url, json={"inputs": [body]}).status_code == 200
                self.sent += 4
                time.sleep(0.02)


def looks(platform: Platform) -> list[dict[str, Any]]:
    """The looks on the ledger, oldest first, with when each was written and by whom."""
    ledger = platform.ledger()
    try:
        entries = ledger.read("monitor/toy")
    finally:
        ledger.close()
    return [{"at": entry.at, **entry.body} for entry in entries if entry.kind == "monitored"]


def test_drift_in_live_traffic_is_reported_by_the_schedule_within_one_period(platform: Platform) -> None:
    """Nobody does anything: the clock fires, Evidently compares, and Prefect, MLflow and the ledger know."""
    with Traffic(platform) as traffic:
        wait_until(lambda: traffic.sent >= 800, 60)
        time.sleep(4)  # the servers write their samples every second, and a look leaves the last three out
        by_hand = platform.lockgate("monitor", "toy", "--json")
        assert by_hand.code == 0, by_hand.err + by_hand.out
        assert (by_hand.json["verdict"], by_hand.json["standing"]) == ("pass", [])
        planted = time.time()
        traffic.shift = 1.0
        wait_until(lambda: any(look["seen"]["until"] >= planted + PERIOD_S for look in looks(platform)), 240)
        found = looks(platform)
        assert "fail" not in [look["verdict"] for look in found if look["seen"]["until"] <= planted]
        reported = [look for look in found if look["steps"]["began"] == ["drift"]]
        assert len(reported) == 1, [look["says"] for look in found]
        filled = next(look for look in found if look["seen"]["until"] >= planted + PERIOD_S)
        assert reported[0]["at"] <= filled["at"], "the first look at a period that the drift filled, or an earlier one"
        assert "visits" in reported[0]["says"]
        check_prefect(platform)
        check_mlflow(platform)
    check_evidently(platform)
    assert platform.lockgate("status", "--json").json["models"][0]["traffic"] == "v1 100 %"
    replay = platform.lockgate("audit", "replay", "monitor/toy", "--json")
    assert replay.code == 0
    assert replay.json["differences"] == []


def check_prefect(platform: Platform) -> None:
    """An event that automations can hang on, a table, and the retraining that the policy names."""
    api = f"http://127.0.0.1:{platform.ports['PREFECT']}/api"

    def told() -> list[Any]:
        wanted = {"filter": {"event": {"name": ["lockgate.monitor.drift"]}}}
        return list(httpx.post(f"{api}/events/filter", json=wanted).json()["events"])

    wait_until(lambda: bool(told()), 60)
    (event,) = told()
    assert event["resource"]["prefect.resource.id"] == "lockgate.model.toy"
    assert {each["prefect.resource.role"] for each in event["related"]} >= {"version", "flow-run"}

    def asked() -> list[Any]:
        runs = httpx.post(f"{api}/flow_runs/filter", json={}).json()
        return [run for run in runs if run["parameters"] == {"at_once": False} and not run["auto_scheduled"]]

    wait_until(lambda: bool(asked()), 60, "the retraining follows the event")
    assert len(asked()) == 1
    runs = httpx.post(f"{api}/flow_runs/filter", json={}).json()
    assert "monitor *" in {run["name"] for run in runs if run["auto_scheduled"]}
    assert "toy-monitor" in {each["key"] for each in httpx.post(f"{api}/artifacts/filter", json={}).json()}


def check_mlflow(platform: Platform) -> None:
    """Figures of each period and Evidently's page with the version's run, the verdict on the version."""
    import mlflow

    client = mlflow.MlflowClient(f"http://127.0.0.1:{platform.ports['MLFLOW']}")
    wait_until(lambda: client.get_model_version("toy", "1").tags["lockgate.monitor.verdict"] == "fail", 60)
    run = client.get_model_version("toy", "1").tags["lockgate.run"]
    history = [point.value for point in client.get_metric_history(run, "monitor.inputs.visits")]
    assert history[0] < 0.2 < history[-1]
    pages = {Path(item.path).name for item in client.list_artifacts(run, "lockgate/reports")}
    assert "monitor-newest.html" in pages
    assert any(name.startswith("monitor-2") for name in pages)


def check_evidently(platform: Platform) -> None:
    """Evidently's own UI has a project of the model's, with a run for each look."""
    api = f"http://127.0.0.1:{platform.ports['EVIDENTLY']}/api"

    def asked(what: str) -> list[dict[str, str]]:
        """Its server answers 500 while a file that it reads is just being written."""
        answer = httpx.get(f"{api}/projects{what}")
        return list(answer.json()) if answer.is_success else []

    def looks() -> int:
        projects = asked("")
        return len(asked(f"/{projects[0]['id']}/snapshots")) if [each["name"] for each in projects] == ["toy"] else 0

    wait_until(lambda: looks() >= 2, 60)
