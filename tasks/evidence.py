"""What there is to judge by: counters read as totals of this rollout, and comparisons of sampled rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from policies import shifts
from policies.events import Phase
from policies.evidence import Counts, Drift, Evidence, Outcomes, Pairs
from policies.policy import Policy
from policies.rollout import Rollout
from tasks.ports import NotThere, PortError, Telemetry

_LABELS_EVERY_S = 5.0


def _since(now: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    """What was counted between two readings, bucket by bucket; a counter that fell began anew at zero."""
    if len(now) != len(before):
        return now
    gone = any(new < old for new, old in zip(now, before, strict=True))
    return now if gone else tuple(new - old for new, old in zip(now, before, strict=True))


def _plus(total: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    if not total:
        return more
    return tuple(a + b for a, b in zip(total, more, strict=True)) if more else total


@dataclass
class Meter:
    """Turns a version's counters into totals since the first reading, whatever restarts in between.

    Each source's counters may begin anew (a restarted server, a restarted gateway); what was counted before is kept.
    """

    role: str
    last: Counts | None = None
    total: Counts = field(default_factory=lambda: Counts(0, 0))

    def read(self, now: Counts) -> Counts:
        """The totals with this reading. One that cannot be is handed on as it is, for the gates to name, and not added:
        a single NaN would else stay in the totals for good."""
        if not all(0 <= count < inf for count in (now.requests, now.errors, *now.latency, *now.scores)):
            return replace(now, epoch=self.role)
        before = self.last if self.last is not None else now
        requests, errors = _since((now.requests, now.errors), (before.requests, before.errors))
        self.total = Counts(
            requests=self.total.requests + requests,
            errors=self.total.errors + errors,
            latency=_plus(self.total.latency, _since(now.latency, before.latency)),
            scores=_plus(self.total.scores, _since(now.scores, before.scores)),
            epoch=self.role,
        )
        self.last = now
        return self.total


@dataclass
class Lookout:
    """Looks at one rollout, again and again. A source that cannot be read is named among the problems."""

    telemetry: Telemetry
    policy: Policy
    meters: dict[tuple[str, str], Meter] = field(default_factory=dict)
    first_traffic: float | None = None
    compared_at: float = 0.0
    labels_at: float = 0.0
    compared: dict[str, str] = field(default_factory=dict)  # what the last comparison ran into, until the next one
    labelled: dict[str, str] = field(default_factory=dict)  # the same of the labels

    def look(self, state: Rollout, at: float) -> Evidence:
        """The evidence now. Raises nothing but programming errors: what could not be read is a problem, not a crash."""
        if self.first_traffic is None:
            self.first_traffic = at
        watching = state.phase is Phase.WATCHING
        problems: dict[str, str] = {}
        stable = self._counts(state, state.stable, shadow=watching, problems=problems)
        candidate = self._counts(state, state.candidate, shadow=state.phase is Phase.SHADOW, problems=problems)
        drift, pairs = None, None
        if at - self.compared_at >= shifts.EVERY_S or at < self.compared_at:
            self.compared = {}
            drift = self._drift(state, self.compared)
            pairs = self._pairs(state, self.compared)
            if drift is not None or self.compared or self.policy.rollout.gates.drift is None:
                self.compared_at = at
        outcomes = None
        if at - self.labels_at >= _LABELS_EVERY_S or at < self.labels_at:
            self.labelled = {}
            outcomes, self.labels_at = self._outcomes(state, self.labelled), at
        return Evidence(at, stable, candidate, drift, pairs, {**problems, **self.compared, **self.labelled}, outcomes)

    def _counts(self, state: Rollout, version: str | None, shadow: bool, problems: dict[str, str]) -> Counts | None:
        if version is None:
            return None
        role = "shadow" if shadow else "live"
        try:
            now = self.telemetry.counts(state.model, version, shadow)
        except PortError as exc:
            problems["counts"] = str(exc)
            return None
        return self.meters.setdefault((version, role), Meter(role)).read(now)

    def _begin(self) -> float:
        return (self.first_traffic or 0.0) + self.policy.rollout.burn_in

    def _drift(self, state: Rollout, problems: dict[str, str]) -> Drift | None:
        gate = self.policy.rollout.gates.drift
        if gate is None or state.stable is None:
            return None
        try:
            return self.telemetry.drift(
                state.model, state.stable, state.candidate, gate.columns, gate.method, self._begin()
            )
        except NotThere:
            return None  # no rows yet, or the comparison is under way: no evidence, and the gate holds
        except PortError as exc:
            problems["drift"] = str(exc)
            return None

    def _pairs(self, state: Rollout, problems: dict[str, str]) -> Pairs | None:
        gate = self.policy.rollout.gates.disagreement
        if gate is None or state.stable is None or state.phase is Phase.CANARY:
            return None  # in a canary each request is answered by one version
        try:
            return self.telemetry.pairs(state.model, state.stable, state.candidate, gate.tolerance, self._begin())
        except NotThere:
            return None
        except PortError as exc:
            problems["pairs"] = str(exc)
            return None

    def _outcomes(self, state: Rollout, problems: dict[str, str]) -> Outcomes | None:
        gate = self.policy.rollout.gates.quality
        if gate is None or state.stable is None:
            return None
        try:
            return self.telemetry.outcomes(
                state.model, state.stable, state.candidate, gate.metric, self._begin(), gate.wait
            )
        except NotThere:
            return None
        except PortError as exc:
            problems["labels"] = str(exc)
            return None
