"""What happens to a rollout and what a rollout asks for, as values that the ledger can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from policies.freeze import Window
from policies.verdict import Verdict


class Phase(StrEnum):
    """Where a rollout stands."""

    PENDING = "pending"
    SHADOW = "shadow"
    CANARY = "canary"
    PROMOTING = "promoting"
    WATCHING = "watching"
    PROMOTED = "promoted"
    ROLLING_BACK = "rolling back"
    ROLLED_BACK = "rolled back"
    REFUSED = "refused"
    HALTED = "halted"


ENDED = frozenset({Phase.PROMOTED, Phase.ROLLED_BACK, Phase.REFUSED, Phase.HALTED})
LOOKED_AT = frozenset({Phase.SHADOW, Phase.CANARY, Phase.WATCHING})


class Do(StrEnum):
    """The effects that the machine asks for."""

    CHECK = "check"  # validate and benchmark; nothing is live yet
    DEPLOY = "deploy"  # the candidate runs, without traffic
    ROUTE = "route"  # the traffic is as said
    ALIAS = "alias"  # the registry's champion and previous
    UNDEPLOY = "undeploy"  # a version that is needed no more
    QUARANTINE = "quarantine"  # these bytes are not to serve again
    TELL = "tell"  # tags, notices: what became of the version
    PAGE = "page"  # wake a person


@dataclass(frozen=True)
class Effect:
    """Something to be done, named by the entry that asked for it: doing it twice is doing it once.

    `weight` and `shadow` (percent) belong to ROUTE; `version` to ALIAS and UNDEPLOY, and with ROUTE it is the version
    that alone gets the traffic; `text` to PAGE and TELL.
    """

    do: Do
    asked_by: int
    weight: int = 0
    shadow: int = 0
    version: str | None = None
    text: str = ""

    @property
    def id(self) -> str:
        return f"{self.asked_by}:{self.do}:{self.version or ''}"


@dataclass(frozen=True)
class Stop:
    """One stage as the machine sees it: shares in percent, the least time in seconds."""

    phase: Phase
    weight: int
    shadow: int
    length_s: float


@dataclass(frozen=True)
class Quorum:
    """Who must agree before the candidate goes on: `count` of the people in `by`, none of whom asked for it.

    `before` is `canary` (any live traffic) or `promote`. An approval counts for `expires_s`; the rollout waits for
    `wait_s`, then goes back or pauses (`on_silence`).
    """

    before: str
    by: tuple[str, ...]
    count: int
    expires_s: float
    wait_s: float
    on_silence: str


@dataclass(frozen=True)
class Terms:
    """What the policy says that the machine needs; kept in the first event, so that the ledger alone suffices."""

    stops: tuple[Stop, ...]
    watch_s: float
    watch_shadow: int
    patience_s: float
    grace_s: float
    pause_max_s: float
    on_exhausted: str
    check_s: float = 1800.0
    effect_s: float = 120.0
    approvals: Quorum | None = None
    freeze: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something that happened, at POSIX time `at`, written as ledger entry `number`."""

    at: float
    number: int


@dataclass(frozen=True)
class Requested(Event):
    """Somebody (`by`) wants the candidate in; `stable` is the proven version that serves now, if any; `signed`: the
    signature of the bytes, where the policy asks for one."""

    model: str
    candidate: str
    digest: str
    stable: str | None
    terms: Terms
    reason: str = ""
    by: str = ""
    signed: str = ""


@dataclass(frozen=True)
class Checked(Event):
    """The checks before any traffic are through. `evidence_hash`: of what people who must approve are shown."""

    verdict: Verdict
    says: str
    evidence_hash: str = ""


@dataclass(frozen=True)
class Done(Event):
    """An effect was carried out."""

    effect: str


@dataclass(frozen=True)
class Failed(Event):
    """An effect could not be carried out. `final`: another try will not help."""

    effect: str
    error: str
    final: bool = False


@dataclass(frozen=True)
class Looked(Event):
    """The gates were asked. `evidence_hash`: of what people who must approve are shown."""

    verdict: Verdict
    says: str
    evidence_hash: str = ""


@dataclass(frozen=True)
class Ticked(Event):
    """Time has passed, and it matters (`due`)."""


@dataclass(frozen=True)
class Ordered(Event):
    """A person (or a newer version) orders: `promote`, `abort`, `pause` or `resume`."""

    order: str
    reason: str = ""
    by: str = ""


@dataclass(frozen=True)
class Answered(Event):
    """A person who was asked for approval says `approve` or `refuse`, of these bytes and of this evidence.

    `by_person`: the name counts as `approval.person` compares it. Entries from before that rule do not have it: they
    count letter by letter, as they did when what came after them was done.
    """

    by: str
    answer: str
    digest: str
    evidence_hash: str
    reason: str = ""
    ticket: str = ""
    by_person: bool = True


@dataclass(frozen=True)
class Lost(Event):
    """The holder of the route took the traffic back by itself (the lease ran out), or obeys somebody else now."""

    says: str


@dataclass(frozen=True)
class Taken(Event):
    """A controller takes the rollout over: from now on only it may act. Whoever held it before must stop."""

    by: str


@dataclass(frozen=True)
class Noted(Event):
    """A page for people about `what` was made (`link`), or could not be (`error`). The rollout is as it was."""

    what: str
    link: str = ""
    error: str = ""


KINDS: Mapping[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (Requested, Checked, Done, Failed, Looked, Ticked, Ordered, Answered, Lost, Taken, Noted)
}


def to_body(event: Event) -> tuple[str, dict[str, Any]]:
    """The event as a ledger entry's kind and JSON-able body (time and number are the entry's own)."""
    body = asdict(event) if isinstance(event, Requested) else dict(vars(event))  # only a request has parts of its own
    del body["at"], body["number"]
    return type(event).__name__.lower(), body


def from_body(kind: str, body: Mapping[str, Any], at: float, number: int) -> Event:
    """The event that the ledger entry holds. Further keys of the body (evidence, reports) are not the machine's.

    Raises ValueError for an unknown kind or a body that does not fit.
    """
    made = KINDS.get(kind)
    if made is None:
        raise ValueError(f"ledger entry {number} has the unknown kind '{kind}'; known: {', '.join(KINDS)}")
    known = {name: value for name, value in body.items() if name in made.__dataclass_fields__}
    if made is Requested:
        stops = tuple(Stop(**{**stop, "phase": Phase(stop["phase"])}) for stop in known["terms"]["stops"])
        quorum = known["terms"].get("approvals")
        approvals = Quorum(**{**quorum, "by": tuple(quorum["by"])}) if quorum else None
        freeze = tuple(Window(**window) for window in known["terms"].get("freeze", ()))
        known["terms"] = Terms(**{**known["terms"], "stops": stops, "approvals": approvals, "freeze": freeze})
    if made is Answered:
        known.setdefault("by_person", False)
    if "verdict" in known:
        known["verdict"] = Verdict(known["verdict"])
    return made(at=at, number=number, **known)
