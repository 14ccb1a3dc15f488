"""The one place that names adapters: ports, for the platform that the settings point to."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from flows.lingering import linger
from flows.settings import Settings
from infra import health_local
from infra.databases_postgresql import databases, shown
from infra.health_local import Finding as Finding
from infra.hints_mlflow import Doorkeeper as Doorkeeper
from infra.hints_mlflow import Unbelievable as Unbelievable
from infra.part_local import SILENCE
from infra.part_local import Part as Part
from infra.platform_local import (
    Addresses as Addresses,
)
from infra.platform_local import (
    Beside,
    LocalPlatform,
    free_port,
    is_free,
    lock,
    running,
    secret,
)
from infra.platform_local import (
    announce as _announce,
)
from infra.recording_arrow import Candidate as Candidate
from policies.evidence import MONITOR_ROWS_MAX
from policies.traffic import Route
from tasks.ports import BadInput, Ledger, PortError, Ports
from tasks.ports_monitor import Herald, MonitorPorts

if TYPE_CHECKING:
    from infra.labels_arrow import LabelStore
    from infra.recording_arrow import ArrowRecordings


health = health_local

_RECONCILER = Beside("Reconciler", "flows.reconciler")
_BESIDE = (
    _RECONCILER,
    Beside("Worker", "flows.worker", announces=True, children_outlive=True),
    Beside("Receiver", "flows.receiver", announces=True),
)


T = TypeVar("T")


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def beside(self, work: Callable[[], T]) -> Future[T]:
        made: Future[T] = Future()
        context = copy_context()

        def fulfil() -> None:
            try:
                made.set_result(context.run(work))
            except BaseException as exc:  # noqa: BLE001 - it is raised where the result is asked for
                made.set_exception(exc)

        thread = Thread(target=fulfil, name="beside", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # as many threads as the system allows
            made.set_exception(PortError(f"nothing can be done beside the looks: {exc}"))
        else:
            linger(thread)
        return made


def platform(settings: Settings) -> LocalPlatform:
    """The local platform that the settings describe, not started."""
    return LocalPlatform(
        settings.folder,
        prefect_port=settings.prefect_port,
        mlflow_port=settings.mlflow_port,
        gateway_port=settings.gateway_port,
        evidently_port=settings.evidently_port,
        trigger_port=settings.trigger_port,
        database=settings.database,
        ledger=settings.ledger_url,
        beside=_BESIDE,
        env=settings.variables(),
    )


def announce(settings: Settings, module: str) -> None:
    """This process of the platform is ready."""
    _announce(settings.folder, module)


def located(settings: Settings) -> Addresses:
    """Where the running platform is. Raises PortError with what to do if none runs."""
    addresses = running(settings.folder)
    if addresses is None:
        raise PortError(f"no platform runs in {settings.folder}; start one with: lockgate up")
    return addresses


def where(settings: Settings) -> Addresses | None:
    """Where the platform is, if one runs. Raises PortError if that cannot be told."""
    return running(settings.folder)


def prefect_answers(settings: Settings, within_s: float = 60.0) -> bool:
    """Whether the Prefect server that flows will use answers: a flow would wait minutes for one that is not there."""
    prefect = (settings.prefect_url or located(settings).prefect).removesuffix("/api")
    return health.answers(f"{prefect}/api/health", within_s)


def routes(settings: Settings) -> Mapping[str, Route]:
    """The traffic of each model, asked of the running platform's agent alone. Raises PortError."""
    from infra.router_envoy import EnvoyRouter

    return EnvoyRouter(located(settings).agent_home).routes()


def configure(settings: Settings | None = None) -> None:
    """Points Prefect and MLflow of this process at the platform; to be called before either is imported."""
    settings = settings or Settings()
    addresses = located(settings)
    os.environ.update(SILENCE)
    os.environ.update(settings.variables())  # for `connect` within a flow
    os.environ["PREFECT_API_URL"] = settings.prefect_url or f"{addresses.prefect}/api"
    os.environ["PREFECT_HOME"] = str(settings.folder / "prefect")
    # The command says in one sentence what went wrong; Prefect's traceback of it stands in the run's log.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ["MLFLOW_TRACKING_URI"] = settings.mlflow_url or addresses.mlflow


def demo_folder(settings: Settings, keep: Path | None) -> Path:
    """Where the demo's data goes: the folder asked for, or `demo` beside the local platform's data."""
    return (keep or settings.folder / "demo").expanduser().absolute()


def clear_demo(home: Path) -> None:
    """An empty demo folder. Raises BadInput for a folder with other things in it, or where a platform runs; PortError
    where one is starting."""
    if running(home) is not None:
        raise BadInput(f"a platform runs in {home}; stop it first: LOCKGATE_HOME={home} lockgate down")
    mark = home / ".lockgate-demo"
    if home.exists() and any(home.iterdir()) and not mark.exists():
        raise BadInput(f"{home} is not empty and was not made by a demo; choose another with --keep")
    if mark.exists():
        os.close(lock(home))
    shutil.rmtree(home, ignore_errors=True)
    (home / "logs").mkdir(parents=True)
    mark.touch()


def demo_platform(home: Path) -> LocalPlatform:
    """A platform of the demo's own; where they are free, on the ports that `lockgate up` will have: links stay good."""
    os.environ |= {"LOCKGATE_DATABASE": "", "LOCKGATE_LEDGER_URL": ""}  # what a demo leaves stands in its folder alone
    settings = Settings(home=home)
    usual = (settings.prefect_port, settings.mlflow_port, settings.gateway_port)
    prefect, mlflow, gateway = (port if is_free(port) else free_port() for port in usual)
    return LocalPlatform(home, prefect, mlflow, gateway, beside=(_RECONCILER,), env=settings.variables())


def hint_secret(settings: Settings) -> str:
    """What the registry signs its hints with."""
    return secret(settings.folder, "hints")


def subscribe(settings: Settings) -> None:
    """The platform's registry sends its hints to the platform's receiver. Raises PortError."""
    from infra.hints_mlflow import subscribe

    addresses = located(settings)
    subscribe(addresses.mlflow, settings.folder / "cache", addresses.hints, hint_secret(settings))


def train_demo(home: Path) -> Part:
    """The process that trains the demo's models into `home/models`; started."""
    command = [sys.executable, "-m", "infra.training_sklearn", "--out", str(home / "models")]
    part = Part("training", command, {}, home / "logs" / "training.log")
    part.start()
    return part


def replay(home: Path, gateway: str, model: str, rate: float) -> Part:
    """The process that plays the demo's live traffic, counting into `home/clients.json`; started."""
    rows = ["--rows", str(home / "models" / "live.parquet")]
    where = ["--url", gateway, "--model", model, "--rps", f"{rate:g}", "--out", str(home / "clients.json")]
    command = [sys.executable, "-m", "infra.clients_replay", *rows, *where]
    part = Part("clients", command, {}, home / "logs" / "clients.log")
    part.start()
    return part


def ledger(settings: Settings) -> Ledger:
    """The ledger alone; it needs no running platform. Raises BadInput where one runs that keeps another."""
    from infra.ledger_sql import SqlLedger

    settings.folder.mkdir(parents=True, exist_ok=True)
    url = settings.ledger_url or databases(settings.folder, settings.database).ledger
    addresses = running(settings.folder)
    if addresses is not None and addresses.ledger not in ("", shown(url)):
        raise BadInput(
            f"the platform in {settings.folder} keeps its ledger in {addresses.ledger}, and this command would write"
            f" to {shown(url)}; set LOCKGATE_DATABASE (or LOCKGATE_LEDGER_URL) as it was for `lockgate up`"
        )
    return SqlLedger(url)


def has_ledger(settings: Settings) -> bool:
    """Whether there is one to be read: opening one that is a file would make it."""
    return bool(settings.ledger_url or settings.database) or (settings.folder / "ledger.db").exists()


def herald(book: Ledger | None = None) -> Herald:
    """Who tells the Prefect server that this process has been pointed at; of the ledger, if of one."""
    from infra.herald_prefect import PrefectHerald

    return PrefectHerald(book)


def prefect_client(timeout_s: float = 5.0) -> AbstractContextManager[Any]:
    """A client of the Prefect server that this process has been pointed at, which asks once. Raises PortError."""
    from infra.client_prefect import client

    return client(timeout_s)


def links(model: str, version: str) -> dict[str, str]:
    """Where people find more about the version, by name."""
    settings = Settings()
    addresses = located(settings)
    mlflow = settings.mlflow_url or addresses.mlflow
    found = {"version in MLflow": f"{mlflow}/#/models/{quote(model, safe='')}/versions/{quote(version)}"}
    if addresses.evidently:
        found["Evidently"] = addresses.evidently
    return found


def label_store(settings: Settings) -> LabelStore:
    """Where labels that come later are kept; it needs no running platform."""
    from infra.labels_arrow import LabelStore

    return LabelStore(settings.folder / "agent")


def supervisor_of(settings: Settings) -> int | None:
    """The process that supervises the platform in the folder, if one runs."""
    addresses = running(settings.folder)
    return addresses.pid if addresses else None


def ready(settings: Settings) -> bool:
    """Whether a platform runs in the folder, with all its parts ready."""
    addresses = running(settings.folder)
    return addresses is not None and addresses.ready


def connect(settings: Settings | None = None) -> Ports:
    """The ports, bound to the running platform; the same ones each time. Raises PortError if there is none."""
    settings = settings or Settings()
    return _bound(settings.model_dump_json(), located(settings).pid)


@lru_cache(maxsize=1)
def _bound(settings_json: str, _platform: int) -> Ports:
    """One set of adapters a process: some hold a worker process whose vendor takes seconds to import."""
    from infra.contract_great_expectations import GreatExpectationsContract
    from infra.drift_evidently import EvidentlyDrift
    from infra.inspector_onnx import OnnxInspector
    from infra.pages_evidently import EvidentlyPages
    from infra.probe_http import HttpProbe
    from infra.registry_mlflow import MlflowRegistry
    from infra.report_html import HtmlReporter
    from infra.router_envoy import EnvoyRouter
    from infra.rows_arrow import ArrowRows
    from infra.target_local import LocalTarget
    from infra.telemetry import LiveTelemetry

    settings = Settings.model_validate_json(settings_json)
    addresses = located(settings)
    drift = EvidentlyDrift(wait_s=0.2)
    atexit.register(drift.close)
    pages = EvidentlyPages(addresses.agent_home)
    clock = SystemClock()
    atexit.register(pages.close)
    return Ports(
        registry=MlflowRegistry(settings.mlflow_url or addresses.mlflow, settings.folder / "cache"),
        inspector=OnnxInspector(),
        rows=ArrowRows(),
        contract=GreatExpectationsContract(),
        probe=HttpProbe(),
        target=LocalTarget(addresses.agent_home),
        router=EnvoyRouter(addresses.agent_home),
        telemetry=LiveTelemetry(addresses.agent_home, drift, clock),
        ledger=ledger(settings),
        reporter=HtmlReporter(),
        clock=clock,
        pages=pages,
    )


def connect_monitor(settings: Settings | None = None) -> MonitorPorts:
    """What `monitor` needs beside `connect`; the same each time. Raises PortError if no platform runs."""
    settings = settings or Settings()
    return _monitoring(settings.model_dump_json(), located(settings).pid)


@lru_cache(maxsize=1)
def _monitoring(settings_json: str, _platform: int) -> MonitorPorts:
    from infra.drift_evidently import EvidentlyDrift
    from infra.monitor_evidently import EvidentlyMonitor
    from infra.windows_arrow import SampledWindows

    settings = Settings.model_validate_json(settings_json)
    # A look has a period's time, and yields to the servers.
    drift = EvidentlyDrift(rows_max=MONITOR_ROWS_MAX, timeout_s=900.0)
    atexit.register(drift.close)
    return MonitorPorts(
        windows=SampledWindows(located(settings).agent_home),
        comparer=EvidentlyMonitor(drift, settings.folder / "evidently"),
        herald=herald(),
    )


def recordings(settings: Settings | None = None) -> ArrowRecordings:
    """The traffic that the running platform's servers sampled. Raises PortError if none runs."""
    from infra.drift_evidently import EvidentlyDrift
    from infra.recording_arrow import ArrowRecordings

    drift = EvidentlyDrift()
    atexit.register(drift.close)
    return ArrowRecordings(located(settings or Settings()).agent_home, drift)
