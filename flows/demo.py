"""The demo: a year of an airline's delay model. One good version is promoted, two bad ones are taken back.

Everything is real: the Prefect server, the MLflow registry, Envoy, the model servers, the traffic; only the airline's
year passes faster.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.live import LiveView
from flows.output import output
from flows.overview import newest
from flows.run import guarded
from flows.settings import Settings, read_settings
from flows.wiring import (
    Part,
    clear_demo,
    configure,
    demo_folder,
    demo_platform,
    ledger,
    located,
    replay,
    train_demo,
)
from tasks.ports import BadInput, PortError

MODEL = "flight-delay"
POLICY = "demo-flights"
STORY = {
    "1": "trained on January to March; the first version, so there is nothing to compare it with",
    "2": "a better model",
    "3": "its pipeline computes a feature in other units than serving sends; offline it looks fine",
    "4": "predicts well, but is slow on some requests and fails on others",
}
EXPECTED = {"1": "promoted", "2": "promoted", "3": "rolled_back", "4": "rolled_back"}


@dataclass
class Stage:
    """What the demo shows beside the rollout: which version is on, how the others ended, how the clients fare."""

    traffic: Path
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    current: str | None = None

    def clients(self) -> dict[str, Any]:
        """The clients' counts so far; zeros before the first."""
        try:
            found: dict[str, Any] = json.loads(self.traffic.read_text())
        except FileNotFoundError:
            return {"requests": 0, "failed": 0}
        return found

    def below(self) -> str:
        seen = self.clients()
        return f"clients: {seen['requests']} requests, {seen['failed']} failed" if seen["requests"] else ""

    def above(self) -> RenderableType:
        lines = []
        for version, words in STORY.items():
            outcome = self.outcomes.get(version)
            if outcome:
                mark, style = outcome["outcome"].replace("_", " "), "green" if version in "12" else "red"
            else:
                mark, style = ("now", "bold cyan") if version == self.current else ("", "dim")
            lines.append(Text.assemble((f" v{version} ", style), (f"{mark:<12}", style), (words, "dim")))
        return Group(*lines, Text(""))


def play(json_file: Path | None, keep: Path | None, rate: float, out: Console, err: Console) -> int:
    """Plays the demo; 0 if every version ended as it should and no client's request failed, else 1 (3: unfinished)."""
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    home = demo_folder(read_settings(), keep)
    children: list[Part] = []
    platform = demo_platform(home)
    try:
        clear_demo(home)
        if json_file is not None and not json_file.resolve().parent.is_dir():
            raise BadInput(f"{json_file} cannot be written: its folder is not there")
        out.print("A year of an airline's delay model: will this flight arrive more than 15 minutes late?")
        children.append(train_demo(home))
        platform.start(lambda text: out.print(f"  {text}", markup=False))
        _await(children[0], out)
        return _deliveries(home, children, json_file, rate, out, err, began)
    except PortError as exc:
        err.print(f"lockgate: {exc}", markup=False)
        return 2 if isinstance(exc, BadInput) else 3
    except KeyboardInterrupt:
        err.print("interrupted; stopping everything")
    finally:
        for child in children:
            child.stop()
        _send_logs()
        platform.stop()
    return _leave(130)


def _send_logs() -> None:
    """What the flows have logged is in Prefect before its server stops: the last run's lines, too."""
    if "prefect" in sys.modules:
        from prefect.logging.handlers import APILogHandler

        APILogHandler().flush()


def _leave(code: int) -> NoReturn:
    """Ends this process now. A vendor's thread that was interrupted while it started is waited for in vain at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _await(training: Part, out: Console) -> None:
    """Waits for the models; what the training says is shown as it comes."""
    said = 0
    while True:
        running = training.code() is None
        lines = training.lines()
        for line in lines[said:]:
            out.print(f"  {line}", markup=False)
        said = len(lines)
        if not running:
            break
        time.sleep(0.2)
    if training.code() != 0:
        raise PortError(f"the models could not be trained: {training.last_words()}")


def _deliveries(
    home: Path, children: list[Part], json_file: Path | None, rate: float, out: Console, err: Console, began: float
) -> int:
    settings = Settings(home=home)
    configure(settings)
    book = ledger(settings)
    stage = Stage(home / "clients.json")
    before: list[str | None] = [None]

    def current() -> str | None:
        name = newest(book, MODEL)
        return name if name != before[0] else None

    clients: Part | None = None
    with LiveView(out, book, current, above=stage.above, below=stage.below) as view:
        for version in STORY:
            stage.current = version
            view.say(f"v{version}: {STORY[version]}")
            _wait_for_the_calendar(home, stage, version, view.say)
            code, outcome = guarded(lambda version=version: _deliver(home, version), err)  # type: ignore[misc]
            if outcome is None:
                return code
            stage.outcomes[version] = outcome
            before[0] = newest(book, MODEL)
            if clients is None:
                clients = replay(home, located(settings).gateway, MODEL, rate)
                children.append(clients)
                _first_answers(stage, clients)
    assert clients is not None
    clients.stop()
    return _finish(home, stage, json_file, out, began)


def _wait_for_the_calendar(home: Path, stage: Stage, version: str, say: Callable[[str], None]) -> None:
    """No version is asked about a flight that it was trained on: live traffic must have come that far."""
    told = json.loads((home / "models" / "demo.json").read_text())
    recipe = next(each for each in told["versions"] if each["version"] == version)
    if stage.clients().get("row", 0) < recipe["live_from"]:
        say(f"    it was trained on flights until {recipe['trained'][1]}; waiting until live traffic is past its data")
    while stage.clients().get("row", 0) < recipe["live_from"]:
        time.sleep(0.2)


def _deliver(home: Path, version: str) -> dict[str, Any]:
    from flows.deliver import deliver
    from flows.delivery import Files

    folder = home / "models" / f"v{version}"
    files = Files(
        validation=str(folder / "validation.parquet"),
        reference=str(folder / "reference.parquet"),
        expected=str(folder / "expected.parquet"),
        metrics=json.loads((folder / "metrics.json").read_text()),
    )
    source = str(folder / "model.onnx")
    return deliver(MODEL, source=source, policy=POLICY, files=files, by="demo", reason=STORY[version])


def _first_answers(stage: Stage, clients: Part) -> None:
    """Live traffic runs before the next version comes."""
    limit = time.monotonic() + 30.0
    while stage.clients()["requests"] == 0:
        if clients.code() is not None or time.monotonic() > limit:
            raise PortError(f"no traffic came to the gateway: {clients.last_words()}")
        time.sleep(0.1)


def _up_again(home: Path) -> str:
    """The command that starts the platform on the demo's data, where the links of its reports lead."""
    usual, now = read_settings(), located(Settings(home=home))
    ports = {"prefect": now.prefect_port, "mlflow": now.mlflow_port, "gateway": now.gateway_port}
    others = [f" --{name}-port {port}" for name, port in ports.items() if port != getattr(usual, f"{name}_port")]
    return f"LOCKGATE_HOME={home} lockgate up" + "".join(others)


def _finish(home: Path, stage: Stage, json_file: Path | None, out: Console, began: float) -> int:
    """The table, the JSON file, and how to look further."""
    clients = stage.clients()
    keys = ("version", "outcome", "reason", "seconds", "candidate_requests")
    document = {
        "deliveries": [{key: outcome[key] for key in keys} for outcome in stage.outcomes.values()],
        "clients": {"requests": clients["requests"], "failed": clients["failed"]},
    }
    table = Table("version", "outcome", "seconds", "requests served", "failed", "reason", box=None)
    for outcome in stage.outcomes.values():
        table.add_row(
            f"v{outcome['version']}",
            outcome["outcome"].replace("_", " "),
            f"{outcome['seconds']:.0f}",
            str(clients["served"].get(outcome["version"], 0)),
            str(outcome["candidate_errors"]),
            outcome["reason"],
        )
    out.print(table)
    out.print(f"Clients sent {clients['requests']} requests; {clients['failed']} failed.")
    reports = [outcome["report"] for outcome in stage.outcomes.values() if outcome["report"]]
    out.print(f"{time.monotonic() - began:.0f} s in all. To look at it in the Prefect and MLflow UIs:")
    out.print(f"  {_up_again(home)}", markup=False)
    out.print("and then at the reports, kept with each version's run in MLflow:")
    for report in reports:
        out.print(f"  {report}", markup=False)
    if json_file is not None:
        with output(json_file) as sink:
            sink.write(json.dumps(document, indent=2).encode() + b"\n")
    as_told = {version: outcome["outcome"] for version, outcome in stage.outcomes.items()} == EXPECTED
    return 0 if as_told and clients["failed"] == 0 else 1
