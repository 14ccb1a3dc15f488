"""Who gets which requests: the route of a model, as agreed between the rollout, the router and the gateway."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

KEY_HEADER = "x-lockgate-key"
TENANT_HEADER = "x-lockgate-tenant"
APART_HEADER = "x-lockgate-apart"  # the gateway's mark on requests that were not split by chance
WAIT_HEADER = "x-request-timeout-ms"  # how long the answer is waited for
RULED_VALUES_MAX = 1000
TIMEOUT_S = 15.0  # where the route says nothing
TIMEOUT_S_MAX = 30.0  # what takes longer could not be counted by its latency
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")  # RFC 9110, section 5.6.2
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,254}[\x21-\x7e])?")
_COOKIE_VALUE = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{1,256}")  # RFC 6265, section 4.1.1


@dataclass(frozen=True)
class Key:
    """Where a request says whose it is."""

    kind: Literal["header", "cookie"] = "header"
    name: str = KEY_HEADER

    def __post_init__(self) -> None:
        if self.kind not in ("header", "cookie"):
            raise ValueError(f"'{self.kind}' is no kind of key; it is a header or a cookie")
        if not _TOKEN.fullmatch(self.name):
            raise ValueError(f"'{self.name}' cannot be the name of a {self.kind}")


@dataclass(frozen=True)
class Rule:
    """Requests with one of the `values` under `key` go `to` that version, whatever the weight."""

    key: Key
    values: tuple[str, ...]
    to: Literal["candidate", "stable"]

    def __post_init__(self) -> None:
        if self.to not in ("candidate", "stable"):
            raise ValueError(f"a rule sends to the candidate or to stable, not to '{self.to}'")
        if not self.values:
            raise ValueError(f"the rule on the {self.key.kind} {self.key.name} names no value")
        for value in self.values:
            if not (_COOKIE_VALUE if self.key.kind == "cookie" else _VALUE).fullmatch(value):
                raise ValueError(f"{value!r} cannot be the value of a {self.key.kind}")


@dataclass(frozen=True)
class Route:
    """The traffic of one model.

    `stable` is the proven version, which also answers whatever the candidate could not. `candidate` gets `weight`
    percent of the live traffic, and a copy of `shadow` percent of the stable version's (its answers are thrown away).
    With `weight` 100 and `shadow` > 0 the roles turn round: the candidate answers, the stable version gets the copies.
    `epoch` orders changes: whoever holds the route refuses an older one. With `lease_s`, the candidate's share ends
    that long after the last renewal, by itself. A route that `continues` such a share is refused once it has ended so:
    whoever asks for it may have stood still for longer than the lease.

    With `timeout_s`, a request is answered within it, by 504 if need be; whoever is asked first has half of it.

    Whoever has the same value under `key` gets the same version. `rules` are the exceptions: to `stable` as long as
    there is a candidate, no copies either; to the candidate while both answer. The former win where both fit.
    """

    model: str
    stable: str | None
    candidate: str | None = None
    weight: int = 0
    shadow: int = 0
    epoch: int = 0
    lease_s: float | None = None
    key: Key = Key()
    rules: tuple[Rule, ...] = ()
    timeout_s: float | None = None
    continues: bool = False

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0 < self.timeout_s <= TIMEOUT_S_MAX:
            raise ValueError(f"a time-out of {self.timeout_s!r} s is not between 0 and {TIMEOUT_S_MAX:g}")
        if not 0 <= self.weight <= 100:
            raise ValueError(f"weight {self.weight} is not between 0 and 100 percent")
        if not 0 <= self.shadow <= 100:
            raise ValueError(f"shadow {self.shadow} is not between 0 and 100 percent")
        if self.candidate is None and (self.weight or self.shadow):
            raise ValueError("a share of the traffic needs a candidate")
        if self.stable is None and self.candidate is not None and self.weight != 100:
            raise ValueError("without a stable version the candidate must get all of the traffic")
        if sum(len(rule.values) for rule in self.rules) > RULED_VALUES_MAX:
            raise ValueError(f"more than {RULED_VALUES_MAX} values in the rules")


def route_of(body: Mapping[str, Any]) -> Route:
    """The route whose fields (`dataclasses.asdict`) went through JSON. Raises TypeError or ValueError if it is none."""
    found = dict(body)
    if "key" in found:
        found["key"] = Key(**found["key"])
    if "rules" in found:
        found["rules"] = tuple(
            Rule(Key(**rule["key"]), tuple(str(value) for value in rule["values"]), rule["to"])
            for rule in found["rules"]
        )
    return Route(**found)
