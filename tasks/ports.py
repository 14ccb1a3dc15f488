"""What the tasks need of the world, as protocols; `infra/` holds an adapter per vendor, `tests/fakes/` a fake per port.

PortError                   could not look, or could not do: worth another try
├── NotThere                the thing asked for does not exist: another try will not help
├── Refused                 the other side understood and said no (a stale epoch, another digest)
└── BadInput                what the user gave cannot be used; the message says what would mend it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from policies.audit import Head
from policies.evidence import Counts, Drift, Outcomes, Pairs
from policies.traffic import Route
from policies.verdict import GateReport

T = TypeVar("T")

SIGNED_TAG = "lockgate.signed"  # on a version in the registry: the signature of its bytes, in base64


class PortError(Exception):
    """The other side could not be reached or did not answer as agreed."""


class NotThere(PortError):
    """The thing asked for does not exist."""


class Refused(PortError):
    """The other side understood and said no."""


class BadInput(PortError):
    """What the user gave cannot be used."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model: `dtype` in Open Inference Protocol words, `shape` with -1 for free axes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Submission:
    """What somebody hands in: `source` is an `.onnx` file, `models:/name/version` or `runs:/id/path`.

    The files are optional; each is CSV or Parquet. `expected` holds input rows with the training framework's own
    predictions in the column `prediction`.
    """

    model: str
    source: str
    validation: Path | None = None
    reference: Path | None = None
    expected: Path | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry. `digest` is the SHA-256 of the `.onnx` file's bytes, in hex; `signed` their signature
    in base64, if they have one."""

    model: str
    version: str
    digest: str
    signature: Signature
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    signed: str = ""


@dataclass(frozen=True)
class Listed:
    """A version as the registry lists it, whoever registered it; `made_at` in POSIX seconds."""

    version: str
    made_at: float
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Registered:
    """A model as the registry lists it, with the versions that it says without being asked: the newest, mostly."""

    model: str
    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    said: Sequence[Listed] = ()


@dataclass(frozen=True)
class Bundle:
    """A version's files on this machine; `onnx` has been checked against the version's digest."""

    onnx: Path
    validation: Path | None = None
    reference: Path | None = None
    expected: Path | None = None


class Registry(Protocol):
    """The register of models: versions, aliases, tags, and what was measured."""

    def register(self, submission: Submission) -> ModelVersion:
        """The version with the submission's bytes; a new one only if no version of the model has their digest. The
        signature of a file is the content of the `.sig` beside it.

        Raises BadInput for a missing or corrupt file, NotThere for an unknown version or run.
        """

    def version(self, model: str, version: str) -> ModelVersion:
        """The version. Raises NotThere."""

    def by_alias(self, model: str, alias: str) -> ModelVersion | None:
        """The version that the alias names, if any. Raises NotThere for an unknown model."""

    def versions(self, model: str) -> Sequence[ModelVersion]:
        """All versions of the model, oldest first; none for an unknown model."""

    def models(self) -> Sequence[Registered]:
        """All models, with their aliases."""

    def listed(self, model: str) -> Sequence[Listed]:
        """All versions of the model, oldest first, without a look at their bytes; none for an unknown model."""

    def fetch(self, version: ModelVersion) -> Bundle:
        """The version's files, digest checked. Raises Refused if the bytes are not those that were registered."""

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        """The alias names the version from now on, or nothing with None. Idempotent."""

    def drop_alias(self, model: str, alias: str, version: str) -> None:
        """The alias names the version no more; one that names another by now is left alone. Idempotent."""

    def tag(self, model: str, version: str, tags: Mapping[str, str]) -> None:
        """The tags are set on the version. Idempotent."""

    def record(self, version: ModelVersion, metrics: Mapping[str, float], files: Sequence[Path] = ()) -> str:
        """Metrics and files are kept with the version's run; returns a link to it."""


class Inspector(Protocol):
    """Reads a model file without running it."""

    def signed(self, onnx: Path, signature: str, keys: Sequence[str]) -> None:
        """Raises Refused unless one of the public keys has signed the file's bytes so."""

    def signature(self, onnx: Path) -> Signature:
        """What the model takes and gives. Raises BadInput with the reason if it is no sound ONNX model."""


@dataclass(frozen=True)
class ContractBreach:
    """One expectation that the rows did not meet: which, on which column, and what was seen instead."""

    expectation: str
    column: str | None
    seen: str


@dataclass(frozen=True)
class ContractResult:
    """What the data contract said: `evaluated` expectations on `rows` rows, those that were not met."""

    rows: int
    evaluated: int
    breaches: tuple[ContractBreach, ...]


class Rows(Protocol):
    """Reads the columns of row files that the checks need. All raise BadInput naming the file and what is wrong."""

    def label(self, path: Path, name: str) -> Sequence[float]:
        """The truth of each row, finite."""

    def prediction(self, path: Path) -> Sequence[float]:
        """The training framework's own prediction of each row."""

    def groups(self, path: Path, name: str) -> Sequence[str]:
        """The column's value on each row, as text."""

    def fits(self, path: Path, signature: Signature, label: str | None) -> None:
        """Returns if the file has all that the model takes."""


class DataContract(Protocol):
    """Checks rows against a suite of expectations."""

    def check(self, suite: Path, rows: Path) -> ContractResult:
        """Raises BadInput for a suite or rows that cannot be read, naming the place."""


@dataclass(frozen=True)
class Endpoint:
    """Where one replica of one version listens: `unix:/path` or `http://host:port`; and which number of its answer is
    the prediction, as in `Deployment`."""

    model: str
    version: str
    url: str
    prediction_output: str | None = None
    prediction_column: int = -1


@dataclass(frozen=True)
class Answers:
    """What a version answered: per row the prediction (NaN where it failed) and, where it did, why."""

    predictions: tuple[float, ...]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """What was measured on a version: latency in milliseconds per request, throughput in requests a second."""

    requests: int
    failed: int
    latency_ms: tuple[float, ...]
    throughput_rps: float
    memory_mb: float
    load_s: float


class Probe(Protocol):
    """Asks model servers directly, beside the live traffic."""

    def ask(self, endpoint: Endpoint, rows: Path, label: str | None, limit: int) -> Answers:
        """The predictions for up to `limit` rows in the file's order. Raises PortError if the server is not there."""

    def race(self, endpoints: Sequence[Endpoint], rows: Path, label: str | None, duration_s: float) -> list[Speed]:
        """Each endpoint's speed on the same rows, measured interleaved in the same run, `duration_s` in all;
        longer, within limits, where a busy machine answers too few requests in it."""


@dataclass(frozen=True)
class Deployment:
    """What shall run: a version's bytes, on how many replicas, with what settings.

    With `signed`, the server refuses bytes that none of the keys `signed_by` has signed so.
    """

    model: str
    version: str
    digest: str
    onnx: Path
    replicas: int = 1
    threads: int = 1
    prediction_output: str | None = None
    prediction_column: int = -1
    signed: str = ""
    signed_by: Sequence[str] = ()


class Target(Protocol):
    """Where versions run. Trials are copies beside the live ones; they never get live traffic."""

    def deploy(self, deployment: Deployment, trial: bool = False) -> list[Endpoint]:
        """The endpoints once every replica is ready. Idempotent. Raises Refused if the server refuses the bytes,
        PortError if it is not ready in time."""

    def undeploy(self, model: str, version: str, trial: bool = False) -> None:
        """Drained and gone. Idempotent."""

    def stored(self, digest: str) -> Path | None:
        """The bytes, if the target has them: going back needs neither registry nor network."""

    def running(self, model: str) -> dict[str, str]:
        """The versions of the model that run with a ready replica, with the digest of each."""


class Router(Protocol):
    """Holds the route of each model."""

    def apply(self, route: Route) -> None:
        """In force when this returns. Raises Refused for an epoch older than the route's."""

    def renew(self, model: str, epoch: int) -> None:
        """The lease begins anew. Raises Refused if that epoch is no longer in force or its lease was lost."""

    def current(self, model: str) -> Route | None:
        """The route in force, if the model has one."""

    def routes(self) -> dict[str, Route]:
        """The routes of all models."""


class Telemetry(Protocol):
    """Reads what the data plane counted and sampled."""

    def warm(self) -> None:
        """Starts whatever takes seconds to start, without waiting for it."""

    def counts(self, model: str, version: str, shadow: bool) -> Counts:
        """Cumulative counters of the version: of copies with `shadow`, else of live requests. Raises PortError."""

    def drift(
        self, model: str, stable: str, candidate: str, columns: Sequence[str], method: str, since: float
    ) -> Drift:
        """Sampled rows of both versions since the time, compared. Raises PortError; NotThere: not yet."""

    def pairs(self, model: str, stable: str, candidate: str, tolerance: float, since: float) -> Pairs:
        """The requests that both versions answered since the time. Raises PortError; NotThere: not yet."""

    def outcomes(self, model: str, stable: str, candidate: str, metric: str, since: float, wait: float) -> Outcomes:
        """The losses of both versions' answers since the time whose labels have come, at most `wait` seconds later.

        A request is counted once, with the label that it had then. Raises PortError; NotThere: not yet.
        """


@dataclass(frozen=True)
class Entry:
    """One event in the ledger. `number` is its place in the whole ledger (and the epoch of what it asked for),
    `sequence` its place in its rollout."""

    number: int
    rollout: str
    sequence: int
    at: float
    actor: str
    kind: str
    body: Mapping[str, Any]
    previous_hash: str
    hash: str


@dataclass(frozen=True)
class Quarantine:
    """Bytes that are not to serve: since when, why, and which rollout found out."""

    digest: str
    reason: str
    rollout: str
    since: float


class DriftPages(Protocol):
    """The drift detector's own pages for people. May be asked from several threads."""

    def write(self, model: str, stable: str, candidate: str, since: float, until: float, path: Path) -> Path:
        """An HTML page at the path on how the rows differ that both versions answered from `since` to `until`.

        It takes seconds to minutes. Raises NotThere where a version has no sampled row of that time, PortError.
        """


class Ledger(Protocol):
    """The events of all rollouts, append-only. A rollout's state is their fold; nothing else is stored."""

    def append(self, rollout: str, sequence: int, at: float, actor: str, kind: str, body: Mapping[str, Any]) -> Entry:
        """The entry, once it is durable. Raises Refused if `sequence` is not the rollout's next (they count from 1):
        somebody else writes it, too. BadInput for a body that JSON cannot hold (NaN and infinity are kept)."""

    def read(self, rollout: str, after: int = 0) -> list[Entry]:
        """The rollout's entries in order, those after the sequence `after`; none for an unknown one."""

    def last(self, rollout: str, count: int) -> list[Entry]:
        """The rollout's newest entries, at most so many, in order."""

    def rollouts(self, model: str | None = None, active: bool = False) -> list[str]:
        """The rollouts, newest first: of one model, or only those not ended."""

    def unsettled(self) -> list[str]:
        """The rollouts for which something is left to be done, newest first: not ended, or ended with effects still
        asked for."""

    def head(self) -> Head:
        """Where the ledger ends now."""

    def lines(self, after: int = 0) -> Iterator[bytes]:
        """The entries after the number `after`, each as the line of `policies.audit`, exactly as it is stored:
        what `verify` checks and `export` exports."""

    def claim(self, model: str, target: str, rollout: str, in_line: bool = False) -> str:
        """Makes it the active rollout of the model on the target; returns the active one's id, which is another's
        if that came first. With `in_line` it joins the end of the queue on its first call, and is made the active one
        only when nobody stands before it; while none is active, the first in the queue is returned."""

    def release(self, model: str, target: str, rollout: str, unbegun: bool = False) -> None:
        """The rollout is active no more, nor in the queue; `unbegun`: unless anything of it is written by now.
        Idempotent."""

    def quarantine(self, digest: str, reason: str, rollout: str) -> None:
        """These bytes are not to serve again. Idempotent."""

    def quarantined(self, digest: str) -> str | None:
        """Why the bytes are in quarantine; None if they are not."""

    def quarantines(self) -> list[Quarantine]:
        """What is in quarantine now, oldest first."""

    def lift(self, digest: str, reason: str, actor: str) -> None:
        """The bytes may serve again; who said so, and why, is kept. Raises NotThere if they are not in quarantine,
        BadInput without a reason."""


@dataclass(frozen=True)
class Look:
    """One look as it is told to people: time, phase, weights and what each gate said."""

    at: float
    phase: str
    weight: int
    shadow: int
    reports: tuple[GateReport, ...]
    stable: Counts | None
    candidate: Counts | None


class Clock(Protocol):
    """Time, so that tests and the simulation can have their own."""

    def now(self) -> float:
        """POSIX seconds."""

    def sleep(self, seconds: float) -> None:
        """Returns that much later."""

    def beside(self, work: Callable[[], T]) -> Future[T]:
        """Begins the work and does not wait for it. What it raises, and that it could not begin, is the future's."""


@dataclass(frozen=True)
class Page:
    """A page that was made while the rollout was under way (`link`), or could not be (`error`)."""

    at: float
    what: str
    link: str
    error: str


@dataclass(frozen=True)
class Story:
    """A rollout as it is told: what was checked, each look, each move; all of it from the ledger."""

    rollout: str
    model: str
    version: str
    baseline: str | None
    outcome: str
    reason: str
    started: float
    ended: float
    looks: Sequence[Look] = ()
    checks: Sequence[GateReport] = ()
    events: Sequence[tuple[float, str, str]] = ()
    candidate_requests: int = 0
    candidate_errors: int = 0
    pages: Sequence[Page] = ()


class Reporter(Protocol):
    """Makes a page of a story."""

    def write(self, story: Story, path: Path) -> Path:
        """A self-contained HTML page at the path."""


@dataclass(frozen=True)
class Ports:
    """One adapter per port: what a flow is given to work with. `flows.wiring` makes it."""

    registry: Registry
    inspector: Inspector
    rows: Rows
    contract: DataContract
    probe: Probe
    target: Target
    router: Router
    telemetry: Telemetry
    ledger: Ledger
    reporter: Reporter
    clock: Clock
    pages: DriftPages | None = None  # without it, none are made
