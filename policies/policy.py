"""The policy: what a version must show, how traffic is let onto it, and what happens when it does not.

`policy_yaml.parse` reads one from YAML.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from policies.approval import person
from policies.audience import Audience
from policies.evidence import LATENCY_EDGES_MS, MONITOR_ROWS_MAX, rows_max
from policies.freeze import Window, endless, window
from policies.traffic import TIMEOUT_S, TIMEOUT_S_MAX

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)$")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class PolicyError(ValueError):
    """The policy text cannot be used; the message says where and what would mend it."""


def _seconds(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if match is None:
            raise ValueError(f"'{value}' is not a duration; write it like 30s, 5m or 1h")
        return float(match[1]) * _UNIT_S[match[2]]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"'{value}' has no unit; write it like {value}s, {value}m or {value}h")
    return value


Seconds = Annotated[
    float,
    BeforeValidator(_seconds, json_schema_input_type=str),
    PlainSerializer(lambda seconds: f"{seconds!r}s", return_type=str),
    Field(ge=0, allow_inf_nan=False),
]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NEW = {"new": True}  # the context in which a policy is validated that nobody has delivered under yet


def _is_new(info: ValidationInfo) -> bool:
    """Some rules are for new policies only: one in the ledger, from before there was the rule, can still be read."""
    return info.context == NEW


def _in_percent(share: float, info: ValidationInfo) -> float:
    if share < 0.01 and _is_new(info):
        raise ValueError(f"{share:g} is less than a percent, in which the gateway counts; choose 0.01 at least")
    return share


Copies = Annotated[
    float,
    Field(gt=0, le=1, allow_inf_nan=False, json_schema_extra={"minimum": 0.01}),
    AfterValidator(_in_percent),
]


def _in_milliseconds(slo_ms: float, info: ValidationInfo) -> float:
    if slo_ms < 1.0 and _is_new(info):
        raise ValueError(
            f"{slo_ms:g} is less than a millisecond, in which the gateway counts (20 is 20 ms); choose 1 at least, or"
            " the gate could never fail"
        )
    return slo_ms


Slow = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False, json_schema_extra={"minimum": 1}),
    AfterValidator(_in_milliseconds),
]
Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Target(_Strict):
    """Where the versions run."""

    kind: Literal["local"] = "local"
    hardware: Literal["cpu"] = "cpu"
    replicas: int = Field(1, ge=1, le=16, description="Model server processes per version.")
    threads: int = Field(1, ge=1, le=64, description="ONNX Runtime threads per process.")


class Prediction(_Strict):
    """Which number of the model's answer is *the* prediction; by default the last column of the last float output."""

    output: str | None = None
    column: int = -1


class Quality(_Strict):
    """Not worse than the champion, on the same validation rows, by more than the margin."""

    metric: Literal["roc_auc", "accuracy", "f1", "log_loss", "brier", "mae", "rmse"] = "roc_auc"
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    confidence: Probability = 0.95
    minimum: float | None = Field(None, description="Absolute bar, also for a first version (for losses: a maximum).")


class Validate(_Strict):
    """What is checked before any traffic."""

    rows: str | None = Field(None, description="Validation rows: a CSV or Parquet file, relative to the policy.")
    label: str = Field("label", description="The column of the validation rows that holds the truth.")
    data: str | None = Field(None, description="A Great Expectations suite (JSON or YAML), relative to the policy.")
    quality: Quality = Quality()
    slices: tuple[str, ...] = Field((), description="Columns; quality must hold within each of their values.")
    slice_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    slice_rows_min: int = Field(200, ge=20, description="Smaller slices are reported, not judged.")
    parity_tolerance: Positive = Field(1e-4, description="Largest difference from the training framework's answers.")


class Slo(_Strict):
    """What the version must hold on the target's hardware."""

    latency_ms_p99: Positive | None = None
    throughput_rps_min: Positive | None = None
    memory_mb_max: Positive | None = None
    load_s_max: Positive | None = None


class Benchmark(_Strict):
    """Speed on the target's hardware, through the real model server."""

    slo: Slo = Slo()
    regression_max: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.5, description="Largest slow-down against the champion: 0.10 is ten percent."
    )
    duration: Seconds = 4.0


class Shadow(_Strict):
    """Copies of live requests; the answers are thrown away."""

    share: Copies = 1.0
    length: Seconds = Field(alias="for", gt=0)


class Canary(_Strict):
    """A share of the live traffic."""

    weight: int = Field(ge=1, le=99, description="Percent of the live traffic.")
    length: Seconds = Field(alias="for", gt=0)


class Stage(_Strict):
    """One step: `shadow:` or `canary:`, never both."""

    shadow: Shadow | None = None
    canary: Canary | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Stage:
        if (self.shadow is None) == (self.canary is None):
            raise ValueError("a stage is either `shadow:` or `canary:`")
        return self

    @property
    def name(self) -> str:
        return f"canary {self.canary.weight} %" if self.canary else f"shadow {round(100 * self.share)} %"

    @property
    def share(self) -> float:
        return self.shadow.share if self.shadow else 0.0

    @property
    def length_s(self) -> float:
        body = self.canary or self.shadow
        assert body is not None
        return body.length


_RATIO = re.compile(r"^(\d+(?:\.\d+)?)\s*x$")


def _margin(value: object) -> float | str:
    """A tolerated difference of two rates (0.005) or a ratio ("2x")."""
    if isinstance(value, str):
        match = _RATIO.match(value.strip())
        if match is None:
            raise ValueError(f"'{value}' is no margin; write a difference like 0.005, or a ratio like 2x")
        if not 1.0 < float(match[1]) <= 100.0:
            raise ValueError(f"'{value}' is no ratio to tolerate; it must be above 1x, and 100x at most")
        return f"{float(match[1]):g}x"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a margin is a difference like 0.005, or a ratio like 2x")
    if not 0.0 < value <= 0.5:
        raise ValueError(f"{value} is no difference of rates to tolerate; it must be above 0, and 0.5 at most")
    return float(value)


Tolerated = Annotated[
    float | str,
    PlainValidator(
        _margin,
        json_schema_input_type=Annotated[float, Field(gt=0, le=0.5)] | Annotated[str, Field(pattern=_RATIO.pattern)],
    ),
]


class Errors(_Strict):
    """Does the candidate fail more often?"""

    margin: Tolerated = Field(
        0.005,
        description="Tolerated difference of the error rates (0.005 is half a point), or a ratio: 2x is twice the "
        "stable version's rate and `floor`.",
    )
    floor: Share = Field(
        0.001, description="With a ratio: so much more is tolerated in any case, even beside no error."
    )
    cluster: int = Field(1, ge=1, le=1000, description="Errors that one cause makes at once; they count as one.")


class Latency(_Strict):
    """Are more requests slower than the SLO?"""

    slo_ms: Slow
    margin: Tolerated = Field(
        0.01, description="Tolerated difference of the shares beyond `slo_ms`, or a ratio: 2x is twice, and `floor`."
    )
    floor: Share = Field(0.001, description="With a ratio: so much more is tolerated in any case.")
    cluster: int = Field(1, ge=1, le=1000, description="Slow requests that one cause makes at once; they count as one.")


class Drifting(_Strict):
    """Do its predictions (or what it was asked) differ from the stable version's at the same time?"""

    columns: tuple[str, ...] = Field(("prediction",), min_length=1)
    method: Literal["wasserstein", "ks", "psi", "jensenshannon", "hellinger"] = "wasserstein"
    threshold: Positive = Field(0.1, description="Tolerated distance: what is shown to be beyond it fails.")
    rows_min: int = Field(500, ge=100, description="Rows of each version, before anything is said; as compared.")

    @model_validator(mode="after")
    def _comparable(self, info: ValidationInfo) -> Drifting:
        if self.rows_min > (most := rows_max(self.method)) and _is_new(info):
            raise ValueError(
                f"rows_min is {self.rows_min:,}, and {self.method} compares {most:,} rows of each version at most;"
                f" choose {most:,} at most, or it would never pass"
            )
        return self


class Disagreement(_Strict):
    """Shadow: on the very same requests, how often another answer?"""

    margin: Share = Field(0.05, description="Tolerated share of requests answered otherwise.")
    tolerance: Positive = Field(0.1, description="Predictions nearer to each other than this count as the same.")


class Labelled(_Strict):
    """Once labels come: is its mean loss higher than the stable version's?

    It may fail at any look. Labels lag, so it is asked for a pass before promotion only, in the last stage.
    """

    metric: Literal["brier", "accuracy"] = Field(
        "brier", description="The loss: (prediction - label)^2, or 1 where the prediction is on the other side of 0.5."
    )
    margin: Annotated[float, Field(gt=0, le=0.5)] = Field(0.02, description="Tolerated difference of the mean losses.")
    rows_min: int = Field(200, ge=20, description="Labelled requests of each version, before it passes.")
    required: bool = Field(True, description="Whether it must pass before promotion; else it only may fail.")
    wait: Seconds = Field(86400.0, gt=0, description="A label that comes later than this after the answer is ignored.")


class Gates(_Strict):
    """The questions asked at every look: `errors` unless it is null, and of the others those that are named."""

    errors: Errors | None = Errors()
    latency: Latency | None = None
    drift: Drifting | None = None
    disagreement: Disagreement | None = None
    quality: Labelled | None = None


class Watch(_Strict):
    """How long a promoted version is watched, with the former one kept warm."""

    length: Seconds = Field(3600.0, alias="for")
    shadow: Copies = Field(0.1, description="Share of the live requests copied to the former version, for comparison.")


class RolloutPolicy(_Strict):
    """How traffic is let onto a version."""

    error_budget: Probability = Field(0.05, description="Chance that a good version is rolled back, over all looks.")
    first: Literal["direct", "refuse"] = Field(
        "direct", description="A model's first version has no baseline: let it have all traffic, or refuse it."
    )
    on_conflict: Literal["queue", "supersede", "reject"] = "queue"
    on_exhausted: Literal["rollback", "pause"] = "rollback"
    stages: tuple[Stage, ...] = Field(min_length=1)
    audience: Audience = Audience()
    timeout: Annotated[Seconds, Field(gt=0, le=TIMEOUT_S_MAX)] | None = Field(
        None, description="A request is answered within it; a version that has not answered in half of it has failed."
    )
    gates: Gates = Gates()
    watch: Watch = Watch()
    look_every: Seconds = Field(1.0, gt=0)
    burn_in: Seconds = Field(5.0, description="The first seconds of a new replica do not count as evidence.")
    patience: Seconds = Field(600.0, description="How long a stage may wait for evidence beyond its length.")
    grace: Seconds = Field(30.0, description="How long a source of evidence may be down before patience is spent.")
    pause_max: Seconds = Field(86400.0, gt=0, description="A pause ends by rollback after this long.")
    lease: Seconds = Field(15.0, gt=0, description="Without renewal for this long, traffic goes back by itself.")

    @model_validator(mode="after")
    def _order(self) -> RolloutPolicy:
        weights = [stage.canary.weight for stage in self.stages if stage.canary]
        if weights != sorted(set(weights)):
            raise ValueError(f"canary weights must rise from stage to stage, not {weights}")
        kinds = [stage.canary is not None for stage in self.stages]
        if kinds != sorted(kinds):
            raise ValueError("shadow stages come before canary stages")
        if not weights and any(rule.to == "candidate" for rule in self.audience.rules):
            raise ValueError("`audience.always` needs a canary stage: in shadow the candidate answers nobody")
        if self.lease < 2 * self.look_every:
            raise ValueError(f"lease ({self.lease:g}s) must be at least twice look_every ({self.look_every:g}s)")
        return self

    @model_validator(mode="after")
    def _countable(self, info: ValidationInfo) -> RolloutPolicy:
        most = self.stages[0].length_s + self.patience
        if self.burn_in >= most and _is_new(info):
            raise ValueError(
                f"burn_in ({self.burn_in:g}s) leaves the first stage no evidence: with `patience` it ends after"
                f" {most:g}s; choose a shorter one"
            )
        return self

    @model_validator(mode="after")
    def _exceedable(self, info: ValidationInfo) -> RolloutPolicy:
        """Requests are timed by a histogram: none is counted beyond a latency that only its edges after the time-out
        tell apart."""
        if self.gates.latency is None or not _is_new(info):
            return self
        longest_s = TIMEOUT_S if self.timeout is None else self.timeout
        most = max((edge for edge in LATENCY_EDGES_MS if edge < 1000.0 * longest_s), default=0.0)
        slo_ms = self.gates.latency.slo_ms
        if slo_ms > most:
            raise ValueError(
                f"gates.latency.slo_ms is {slo_ms:g}, and a request is answered within {longest_s:g}s (`timeout`): the"
                f" gate could never fail; choose {math.floor(most)} at most, or a longer time-out"
            )
        return self


class LiveDrift(_Strict):
    """Do the live rows differ from the training rows?"""

    columns: tuple[str, ...] = Field((), description="Inputs to compare; all of them, if empty. Predictions always.")
    method: Literal["wasserstein", "ks", "psi", "jensenshannon", "hellinger"] = Field(
        "wasserstein", description="The distance of numbers; text is compared by jensenshannon."
    )
    threshold: Positive = Field(0.1, description="Smallest distance that counts as a difference.")
    rows_min: int = Field(
        1000,
        ge=200,
        description="Sampled rows of a period, and of the reference.",
        json_schema_extra={"maximum": MONITOR_ROWS_MAX},
    )

    @model_validator(mode="after")
    def _comparable(self, info: ValidationInfo) -> LiveDrift:
        if self.rows_min > MONITOR_ROWS_MAX and _is_new(info):
            raise ValueError(
                f"rows_min is {self.rows_min:,}, and {MONITOR_ROWS_MAX:,} rows are compared at most; choose"
                f" {MONITOR_ROWS_MAX:,} at most, or nothing would ever be said"
            )
        return self


class LiveQuality(_Strict):
    """Is the loss on the labels that have come higher than it was on the validation rows?"""

    metric: Literal["brier", "accuracy"] = Field(
        "brier", description="The loss: (prediction - label)^2, or 1 where the prediction is on the other side of 0.5."
    )
    margin: Annotated[float, Field(gt=0, le=0.5)] = Field(0.05, description="Tolerated difference of the mean losses.")
    rows_min: int = Field(200, ge=20, description="Labelled requests, before anything is said.")
    wait: Seconds = Field(604800.0, gt=0, description="A label that comes later than this after the answer is ignored.")


class Retrain(_Strict):
    """The Prefect deployment that is run when an alarm begins."""

    deployment: str = Field(pattern=r"^[^/]+/[^/]+$", description="FLOW/DEPLOYMENT, as Prefect names it.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of its run.")


class Monitor(_Strict):
    """What is looked at once a version serves alone, period by period."""

    every: Seconds = Field(3600.0, ge=30, le=31 * 86400.0, description="The period.")
    false_alarms_per_year: Annotated[float, Field(ge=0.01, le=12, allow_inf_nan=False)] = Field(
        0.1, description="How many alarms a year chance alone may raise, over all looks of all tests of the model."
    )
    drift: LiveDrift | None = LiveDrift()
    data: str | None = Field(None, description="A Great Expectations suite for live rows, relative to the policy.")
    quality: LiveQuality | None = None
    retrain: Retrain | None = None
    rollback_on: tuple[Literal["drift", "data", "quality"], ...] = Field(
        (), description="Alarms that bring the former version back; the world's drift is no reason for that by itself."
    )

    @model_validator(mode="after")
    def _asked(self, info: ValidationInfo) -> Monitor:
        if not _is_new(info):
            return self
        mended = {"drift": "take `drift: null` away", "data": "add `data: FILE`", "quality": "add `quality: {}`"}
        absent = [name for name in mended if getattr(self, name) is None]
        for name in self.rollback_on:
            if name in absent:
                raise ValueError(f"rollback_on names '{name}', and nobody asks for it: {mended[name]}")
        if self.retrain is not None and {"drift", "quality"} <= {*absent}:
            raise ValueError(
                f"retrain starts with an alarm of drift or quality, and nobody asks for either: {mended['drift']}, or"
                f" {mended['quality']}"
            )
        return self


class Approvals(_Strict):
    """People who must agree before the candidate goes on. The way back never asks anybody."""

    before: Literal["canary", "promote"] = Field("promote", description="Before any live traffic, or before promotion.")
    by: tuple[str, ...] = Field(
        min_length=1,
        description="Who may approve, by name, in capitals or not; never who asked for the delivery.",
        json_schema_extra={"uniqueItems": True},
    )
    count: int = Field(1, ge=1, le=2, description="How many of them must approve.")
    expires: Seconds = Field(86400.0, gt=0, description="How long an approval counts.")
    wait: Seconds = Field(259200.0, gt=0, description="How long the rollout waits for them, watched by its gates.")
    on_silence: Literal["rollback", "pause"] = Field("rollback", description="What happens when that time is over.")

    @field_validator("by")
    @classmethod
    def _each_once(cls, given: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        seen: dict[str, str] = {}
        for name in given if _is_new(info) else ():
            if (same := person(name)) in seen:
                raise ValueError(
                    f"'{seen[same]}' and '{name}' are one person (capitals, spaces around it and composed letters tell"
                    " nobody apart); name each person once"
                )
            seen[same] = name
        return given

    @model_validator(mode="after")
    def _enough(self) -> Approvals:
        if len(set(self.by)) < self.count:
            raise ValueError(f"{self.count} people must approve, and only {len(set(self.by))} may (`by`)")
        return self


class Freeze(_Strict):
    """A time in which nothing new is let on: once, or every week (`from: fri 16:00`, `to: mon 08:00`, in UTC)."""

    begins: str = Field(
        alias="from", description="A time with its zone (2026-12-23T18:00Z), or of the week (fri 16:00)."
    )
    ends: str = Field(alias="to", description="When it is over: a time of the same kind.")
    why: str = Field("", description="What it is for.")

    @field_validator("begins", "ends", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return value.isoformat() if isinstance(value, (datetime, date)) else value  # YAML reads times by itself

    @model_validator(mode="after")
    def _sound(self) -> Freeze:
        self.window()
        return self

    def window(self) -> Window:
        """The same for machines."""
        return window(self.begins, self.ends, self.why)


_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s+((?:[A-Za-z0-9+/=]+\s+)+)-----END PUBLIC KEY-----")


def _base64_in(pem: str) -> str:
    """What stands between PEM's marks; YAML may have made one line of it. Raises ValueError."""
    found = _PEM.fullmatch(pem.strip())
    if found is None:
        raise ValueError("a public key stands between BEGIN PUBLIC KEY and END PUBLIC KEY, in base64 (PEM)")
    return "".join(found[1].split())


class Governance(_Strict):
    """What people decide."""

    approvals: Approvals | None = None
    freeze: tuple[Freeze, ...] = Field((), description="When nothing new is let on. What goes back never waits for it.")
    signed_by: tuple[str, ...] = Field(
        (), description="Public keys (PEM; Ed25519, ECDSA P-256): a candidate's bytes are signed with one of them."
    )

    @field_validator("signed_by")
    @classmethod
    def _as_pem(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for key in given:
            _base64_in(key)
        return given

    @property
    def public_keys(self) -> tuple[str, ...]:
        """In base64 (SubjectPublicKeyInfo), without PEM's lines around them."""
        return tuple(_base64_in(key) for key in self.signed_by)

    @model_validator(mode="after")
    def _ends(self) -> Governance:
        if endless(each.window() for each in self.freeze):
            raise ValueError("the weekly freezes leave no time between them: nothing would ever be let on")
        return self


class Trigger(_Strict):
    """What in the registry asks for a delivery; of the policies in the platform's folder, those that name a model."""

    kind: Literal["alias", "version", "tag", "nothing"] = Field(
        "alias", description="An alias that is set, each new version, a tag on a version, or nothing at all."
    )
    name: str = Field("candidate", min_length=1, description="The name of the alias or tag.")

    @property
    def alias(self) -> str | None:
        """The alias that is taken off a version once its rollout has ended."""
        return self.name if self.kind == "alias" else None


class Policy(_Strict):
    """One policy: the file that a delivery is judged by."""

    name: str = Field(alias="policy", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    model: str | None = Field(None, description="The registered model it is meant for; any, if absent.")
    trigger: Trigger = Trigger()
    target: Target = Target()
    prediction: Prediction = Prediction()
    checks: Validate = Field(Validate(), alias="validate")
    benchmark: Benchmark = Benchmark()
    rollout: RolloutPolicy
    monitor: Monitor = Monitor()
    governance: Governance = Governance()

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON: the same rules have the same digest, however they were written."""
        body = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON Schema of a policy file (draft 2020-12), for editors and for checks elsewhere."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema(by_alias=True)}
