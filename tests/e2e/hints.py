"""Hints that get lost: of the registry's webhooks half are dropped, others doubled, held back or forged, and MLflow and
the receiver are killed in between. `python -m tests.e2e.hints` plays it with 100 versions; exit code 1 if a version was
lost, delivered twice or found late, or a false hint was believed.

The deliveries are cheap (the policy's check fails for want of rows, so each is refused, on the ledger); everything that
brings them about is real: `lockgate up`, MLflow's server and its webhooks, the receiver, Prefect and its worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import mlflow
import psutil

import policies
from flows.story import fold
from infra.hints_mlflow import subscribed
from infra.platform_local import running
from tests.e2e import toy
from tests.e2e.running_platform import ABORTED, Platform, running_platform, wait_until
from tests.infra.postgresql_server import postgresql, programs_or_skip

POLL_S = 5.0
FOUND_S = POLL_S + 5.0
POLICY = """
policy: cheap
validate: {data: expectations.yaml}
rollout: {stages: [canary: {weight: 10, for: 5s}]}
"""
_MADE_UP = {"X-MLflow-Delivery-Id": "made up", "X-MLflow-Signature": "v1,bm90IG91cnM="}


@dataclass
class Courier:
    """Stands between MLflow and the receiver, and is not to be trusted. Counts what the receiver answered to what."""

    to: str
    random: random.Random
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)  # what was sent, and the answer's status
    still: threading.Lock = field(default_factory=threading.Lock)  # who holds it sees no hint under way
    closed: bool = False

    def __post_init__(self) -> None:
        courier = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name: value for name, value in self.headers.items() if name.startswith("X-")}
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
                courier.carry(headers, body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/hints"

    def carry(self, headers: dict[str, str], body: bytes) -> None:
        self.seen.append((headers, body))
        if self.random.random() < 0.5:
            self.did["dropped"] += 1
            if self.random.random() < 0.5:
                self.send("forged", headers, body + b" ")
            return
        if self.random.random() < 0.5:
            self.did["held back"] += 1
            time.sleep(self.random.uniform(0.5, 3.0))  # later ones overtake it
        if self.send("true", headers, body) == 202 and self.random.random() < 0.4:
            self.did["doubled"] += 1
            self.send("doubled", headers, body)

    def send(self, what: str, headers: dict[str, str], body: bytes) -> int:
        with self.still:
            if self.closed:
                return 0
            try:
                status = httpx.post(self.to, headers=headers, content=body, timeout=60.0).status_code
            except httpx.TransportError:  # the receiver is down
                status = 0
            self.answers[what, status] += 1
            return status

    def send_again(self, old: list[tuple[dict[str, str], bytes]]) -> None:
        """What a receiver that has died since had been told: signed, and stale."""
        for headers, body in old:
            self.send("stale", headers, body)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def part(platform: Platform, module: str) -> psutil.Process | None:
    """The supervisor's child that runs the module."""
    addresses = running(platform.home)
    assert addresses is not None
    for child in psutil.Process(addresses.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if module in " ".join(child.cmdline()):
                return child
    return None


def killed(platform: Platform, module: str) -> None:
    """The part is killed, and another one is there."""
    old = part(platform, module)
    assert old is not None
    old.kill()
    wait_until(lambda: (now := part(platform, module)) is not None and now.pid != old.pid, 60, module)


@dataclass
class Story:
    """What is asked for, and what became of it."""

    platform: Platform
    count: int
    seed: int
    asked: dict[str, float] = field(default_factory=dict)  # by model, POSIX seconds
    down: list[tuple[float, float]] = field(default_factory=list)  # when MLflow or the receiver was not there

    def __post_init__(self) -> None:
        uri = f"http://127.0.0.1:{self.platform.ports['MLFLOW']}"
        self.client = mlflow.MlflowClient(uri, uri)
        addresses = running(self.platform.home)
        assert addresses is not None
        self.addresses, self.uri = addresses, uri
        self.courier = Courier(addresses.hints, random.Random(self.seed))
        self.refused: Counter[str] = Counter()

    def play(self) -> None:
        """Asks for all versions, and waits until each has its outcome."""
        names = self._register()
        self._divert(self.courier.url)
        for number, name in enumerate(names):
            if number == self.count // 3:
                began = time.time()
                killed(self.platform, "mlflow server")
                wait_until(self._mlflow_answers, 90, "MLflow answers again")
                self.down.append((began, time.time()))
            if number == 2 * self.count // 3:
                began = time.time()
                old = self.courier.seen[:5]
                with self.courier.still:
                    self._count_refused()
                    killed(self.platform, "flows.receiver")
            self._ask(name)
            time.sleep(self.courier.random.uniform(0.1, 0.6))
            if number == 2 * self.count // 3:
                wait_until(self._receiver_subscribed, 90, "the receiver is there again")
                self.down.append((began, time.time()))
                self._divert(self.courier.url)
                self.courier.send_again(old)
                self.courier.send("forged", {**_MADE_UP, "X-MLflow-Timestamp": str(int(time.time()))}, b"{}")
        # Seldom: MLflow is on the same two cores, and has all the versions to read each time.
        all_done = "every version has its outcome"
        wait_until(lambda: len(self.outcomes()) == self.count, 60 + 15 * self.count, all_done, every_s=5.0)
        with self.courier.still:
            self.courier.closed = True
            self._count_refused()
        self._divert(self.addresses.hints)
        self.courier.close()

    def _register(self) -> list[str]:
        """The models, each with one version of bytes that all share; nothing is asked for yet."""
        import onnx

        mlflow.set_tracking_uri(self.uri)
        mlflow.set_experiment("training")
        with mlflow.start_run():
            model = onnx.load(toy.make(self.platform.files / "hints") / "model.onnx")
            logged = mlflow.onnx.log_model(model, name="model", pip_requirements=["onnxruntime"])
        names = [f"hinted-{self.seed}-{number}" for number in range(self.count)]
        for name in names:
            self.client.create_registered_model(name, tags={"lockgate.policy": "cheap"})
            mlflow.register_model(logged.model_uri, name)
        return names

    def _ask(self, name: str) -> None:
        self.client.set_registered_model_alias(name, "candidate", "1")
        self.asked[name] = time.time()

    def _divert(self, url: str) -> None:
        """From now on MLflow gives its hints there."""
        (hook,) = [each for each in self.client.list_webhooks(max_results=100) if each.name == "lockgate"]
        self.client.update_webhook(hook.webhook_id, url=url)
        time.sleep(1.5)  # MLflow looks at its webhooks once a second

    def _mlflow_answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.uri}/health", timeout=2.0).status_code == 200
        return False

    def _receiver_subscribed(self) -> bool:
        return subscribed(self.uri, self.platform.home / "cache", self.addresses.hints)

    def _count_refused(self) -> None:
        """Adds what this receiver has counted; the next one begins anew."""
        said = httpx.get(self.addresses.hints.replace("/hints", "/metrics"), timeout=10.0).text
        for line in said.splitlines():
            if line.startswith("lockgate_hints_total{"):
                self.refused[line.split('"')[1]] += int(float(line.split()[-1]))

    # ------------------------------------------------------------ what became of it

    def outcomes(self) -> dict[str, str]:
        """By model, what the version's tag says."""
        found = {}
        for version in self.client.search_model_versions("name LIKE 'hinted-%'", max_results=1000):
            if version.name in self.asked and "lockgate.outcome" in version.tags:
                found[version.name] = version.tags["lockgate.outcome"]
        return found

    def runs(self) -> dict[str, list[float]]:
        """By model, when each flow run that was started for it was made."""
        found: dict[str, list[float]] = {name: [] for name in self.asked}
        url = f"http://127.0.0.1:{self.platform.ports['PREFECT']}/api/flow_runs/filter"
        page: list[Any] = []
        offset = 0
        while True:
            body = {"flow_runs": {"tags": {"all_": ["lockgate"]}}, "sort": "ID_DESC", "limit": 200, "offset": offset}
            page = httpx.post(url, json=body, timeout=30.0).json()
            for run in page:
                name = run["parameters"].get("model")
                if name in found:
                    found[name].append(_posix(run["created"]))
            offset += len(page)
            if len(page) < 200:
                return found

    def found_s(self) -> dict[str, float]:
        """By model, after how many seconds in which everything was there the run was asked for."""

        def waited(since: float, until: float) -> float:
            away = sum(max(0.0, min(until, end) - max(since, begin)) for begin, end in self.down)
            return until - since - away

        return {name: waited(self.asked[name], made[0]) for name, made in self.runs().items() if made}

    def late(self) -> list[str]:
        """What was found too late, in sentences."""
        return [f"{name}: found after {seconds:.1f} s" for name, seconds in self.found_s().items() if seconds > FOUND_S]

    def broken(self) -> list[str]:
        """The promises that were broken, in sentences; that of the time is `late`."""
        outcomes, runs, sent = self.outcomes(), self.runs(), self.courier.answers
        told = [f"{name}: outcome {outcomes.get(name)}" for name in self.asked if outcomes.get(name) != "refused"]
        told += [f"{name}: {len(made)} flow runs" for name, made in runs.items() if len(made) != 1]
        book = self.platform.ledger()
        try:
            states = [fold(book.read(name)) for name in book.rollouts()]
        finally:
            book.close()
        per_model = Counter(state.model for state in states if state is not None and state.model in self.asked)
        told += [f"{name}: {per_model[name]} rollouts" for name in self.asked if per_model[name] != 1]
        # One that was held back while the receiver was killed was signed before its successor began: stale.
        right = {"true": {202, 401, 0}, "forged": {401, 0}, "doubled": {409, 0}, "stale": {401}}
        told += [f"a {what} hint was answered {status}" for what, status in sent if status not in right[what]]
        stale = sent["stale", 401] + sent["true", 401]
        counted = {"forged": sent["forged", 401], "replayed": sent["doubled", 409], "stale": stale}
        told += [f"{n} {what}, {self.refused[what]} counted" for what, n in counted.items() if self.refused[what] != n]
        told += [f"{log}: {n} processes aborted" for log, n in self.platform.said(ABORTED).items()]
        return told

    def document(self) -> dict[str, Any]:
        late = sorted(self.found_s().values())
        return {
            "versions": self.count,
            "hints": len(self.courier.seen),
            "did": dict(self.courier.did),
            "sent": {f"{what}: {status}": number for (what, status), number in sorted(self.courier.answers.items())},
            "counted": dict(self.refused),
            "said_locked": self.platform.said("database is locked"),
            "found_s": {"median": round(late[len(late) // 2], 1), "max": round(late[-1], 1), "bar": FOUND_S},
        }


def _posix(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def prepare(home: Path) -> None:
    """The platform's folder has the policy that the versions are delivered by."""
    (home / "policies").mkdir(parents=True, exist_ok=True)
    (home / "policies" / "cheap.yaml").write_text(POLICY)
    library = Path(policies.__file__).parent / "library"
    shutil.copy(library / "flights-expectations.yaml", home / "policies" / "expectations.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--versions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000)
    parser.add_argument("--postgresql", action="store_true", help="on a PostgreSQL server instead of SQLite")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockgate-hints-"))
    prepare(folder / "home")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        env = {"LOCKGATE_REGISTRY_POLL_S": str(POLL_S)}
        if given.postgresql:
            env["LOCKGATE_DATABASE"] = stack.enter_context(postgresql(programs_or_skip()))
        platform = stack.enter_context(running_platform(folder / "home", folder / "files", **env))
        story = Story(platform, given.versions, given.seed)
        story.play()
        broken, document = [*story.broken(), *story.late()], story.document()
    print(
        json.dumps(
            {**document, "seed": given.seed, "seconds": round(time.monotonic() - began), "broken": broken}, indent=2
        )
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
