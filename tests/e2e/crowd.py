"""Many models delivered at once on one machine: `python -m tests.e2e.crowd`.

Each model gets a first version and then, under traffic, a second one; all of them are asked for at the same moment by
the registry's alias. Exit code 1 if one came to no end, a client got no answer, or something was lost to a locked
database.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import mlflow
import onnx

from flows.story import fold
from tests.e2e import toy
from tests.e2e.running_platform import ABORTED, Clients, Platform, running_platform, wait_until

POLICY = toy.POLICY.replace("patience: 60s", "patience: 300s").replace("slo: {latency_ms_p99: 500}, ", "")
ENDS = {"promoted", "rolled_back", "refused"}


def prepare(home: Path, files: Path, names: list[str]) -> None:
    """A policy for each model; its validation rows are the toy's."""
    (home / "policies").mkdir(parents=True, exist_ok=True)
    rows = toy.make(files / "crowd-v1", seed=1) / "validation.csv"
    toy.make(files / "crowd-v2", seed=2)
    for name in names:
        text = POLICY.replace("policy: toy", f"policy: {name}\nmodel: {name}\nvalidate: {{rows: {rows}}}")
        (home / "policies" / f"{name}.yaml").write_text(text)


def deliver_all(platform: Platform, names: list[str], folder: str, limit_s: float) -> dict[str, dict[str, str]]:
    """One version of each, asked for at once; by model, its tags once all have ended."""
    uri = f"http://127.0.0.1:{platform.ports['MLFLOW']}"
    client = mlflow.MlflowClient(uri, uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("training")
    with mlflow.start_run():
        model = onnx.load(platform.files / folder / "model.onnx")
        logged = mlflow.onnx.log_model(model, name="model", pip_requirements=["onnxruntime"])
    versions = {name: str(mlflow.register_model(logged.model_uri, name).version) for name in names}
    for name, version in versions.items():
        client.set_registered_model_alias(name, "candidate", version)

    def tags(name: str) -> dict[str, str]:
        return dict(client.get_model_version(name, versions[name]).tags)

    wait_until(lambda: all("lockgate.outcome" in tags(name) for name in names), limit_s, "all have come to an end")
    return {name: tags(name) for name in names}


def story(platform: Platform, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Both versions of each; what was seen, and the promises that were broken."""
    limit_s = 120 + 60 * len(names)
    began = time.monotonic()
    first = deliver_all(platform, names, "crowd-v1", limit_s)
    first_s, began = time.monotonic() - began, time.monotonic()
    with contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(Clients(platform.ports["GATEWAY"], name, toy.REQUEST, threads=1, pause_s=0.1))
            for name in names
        ]
        second = deliver_all(platform, names, "crowd-v2", limit_s)
        second_s = time.monotonic() - began
    answers = sum(len(clients.answers) for clients in crowd)
    failed = [answer.failure for clients in crowd for answer in clients.failed()]
    broken = [f"{name} v1: {tags}" for name, tags in first.items() if tags["lockgate.outcome"] != "promoted"]
    broken += [f"{name} v2: {tags}" for name, tags in second.items() if tags["lockgate.outcome"] not in ENDS]
    broken += [f"{len(failed)} of {answers} requests failed: {failed[0]}"] if failed else []
    rollouts = _rollouts(platform, names)
    broken += [f"{name}: {count} rollouts" for name, count in rollouts.items() if count != 2]
    states = _states(platform, names)
    broken += [f"{count} flow runs {state}" for state, count in states.items() if state != "COMPLETED"]
    broken += [f"{log}: {count} processes aborted" for log, count in platform.said(ABORTED).items()]
    return {
        "models": len(names),
        "first_s": round(first_s, 1),
        "second_s": round(second_s, 1),
        "ends": dict(Counter(tags["lockgate.outcome"] for tags in second.values())),
        "requests": answers,
        "failed": len(failed),
        "flow_runs": dict(states),
        "said_locked": platform.said("database is locked"),  # what was said is not lost yet
    }, broken


def _rollouts(platform: Platform, names: list[str]) -> Counter[str]:
    book = platform.ledger()
    try:
        states = [fold(book.read(name)) for name in book.rollouts()]
    finally:
        book.close()
    found = Counter(dict.fromkeys(names, 0))
    found.update(state.model for state in states if state is not None and state.settled and state.model in found)
    return found


def _states(platform: Platform, names: list[str]) -> Counter[str]:
    """Of the deliveries' flow runs, once all have ended."""
    url = f"http://127.0.0.1:{platform.ports['PREFECT']}/api/flow_runs/filter"

    def states() -> Counter[str]:
        found = httpx.post(url, json={"flow_runs": {"tags": {"all_": ["lockgate"]}}}, timeout=60.0).json()
        return Counter(run["state_type"] for run in found if run["parameters"].get("model") in names)

    wait_until(lambda: not {"RUNNING", "PENDING", "SCHEDULED"} & {*states()}, 120, "every flow run has ended")
    return states()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", type=int, default=20)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockgate-crowd-"))
    names = [f"crowd-{number}" for number in range(given.models)]
    prepare(folder / "home", folder / "files", names)
    more = {"LOCKGATE_DELIVERIES_AT_ONCE": str(given.models)}
    with running_platform(folder / "home", folder / "files", **more) as platform:
        seen, broken = story(platform, names)
    print(json.dumps({**seen, "broken": broken}, indent=2))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
