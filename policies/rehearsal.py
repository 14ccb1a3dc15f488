"""A rollout played on recorded traffic: the same machine and the same gates, on the recording's own clock.

What cannot be known from a recording is not asked, and said: how fast the real server answers under load, labels that
come later, what people would say. Nothing here touches anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from policies import gates, rollout, shifts
from policies.events import LOOKED_AT, Checked, Do, Done, Event, Looked, Phase, Requested
from policies.evidence import Counts, Drift, Evidence, Pairs
from policies.policy import Policy
from policies.rollout import Rollout
from policies.verdict import GateReport, Verdict, worst

LOOKS_MAX = 5_000  # of one rehearsal; a longer one looks less often than its policy says
Compare = Callable[[NDArray[np.int64], NDArray[np.int64]], Drift | None]


@dataclass(frozen=True)
class Recording:
    """Requests in the order of their times (POSIX seconds), what the stable version answered to each, and what the
    candidate answers to the same; NaN is no answer. `lots` is a number in [0, 1) for each, by chance but for good: who
    is below the share meets the candidate, also when it grows."""

    at: NDArray[np.float64]
    lots: NDArray[np.float64]
    stable: NDArray[np.float64]
    candidate: NDArray[np.float64]

    def __post_init__(self) -> None:
        sizes = {len(each) for each in (self.at, self.lots, self.stable, self.candidate)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError("a recording has requests, and an answer of both versions to each")
        if (np.diff(self.at) < 0).any():
            raise ValueError("a recording's requests are in the order of their times")


@dataclass(frozen=True)
class Move:
    """Where the rollout went, after how many seconds, and why."""

    at_s: float
    label: str
    why: str


@dataclass(frozen=True)
class Rehearsal:
    """How the rollout would have gone. `outcome` is promoted, rolled_back or, where the recording was too short,
    unfinished; `reports` are the gates' last words; `exposed` live requests would have been the candidate's."""

    outcome: str
    why: str
    seconds: float
    requests: int
    exposed: int
    moves: tuple[Move, ...]
    reports: tuple[GateReport, ...]
    not_asked: tuple[str, ...]


def not_asked(policy: Policy) -> tuple[str, ...]:
    """What of the policy a recording cannot answer."""
    asked = policy.rollout.gates
    left = ["the checks and the benchmark before any traffic"]
    left += ["latency: only the real server under live load can tell"] if asked.latency is not None else []
    left += ["quality: the labels come later"] if asked.quality is not None else []
    left += ["approvals"] if policy.governance.approvals is not None else []
    left += ["the freeze"] if policy.governance.freeze else []
    return tuple(left)


def rehearse(
    policy: Policy, model: str, candidate: str, stable: str, recording: Recording, compare: Compare
) -> Rehearsal:
    """The whole rollout, from the recording's first request on. `compare` tells how far the rows of the stable version
    (the first argument, by number) are from the candidate's; it is asked as often as the drift gate may raise an alarm.
    """
    left, rules = not_asked(policy), policy.rollout
    asked = rules.gates.model_copy(update={"latency": None, "quality": None})
    policy = policy.model_copy(update={"rollout": rules.model_copy(update={"gates": asked})})
    world = _World(policy, recording, compare)
    terms = replace(rollout.terms(policy), approvals=None, freeze=())
    begun = float(recording.at[0])
    state, _ = rollout.step(None, Requested(begun, 1, model, candidate, "", stable, terms))
    moves: list[Move] = []
    number = 1
    while (event := world.next(state, number := number + 1)) is not None:
        before = state
        state, _ = rollout.step(state, event)
        if (state.phase, state.stage) != (before.phase, before.stage) and state.phase is not Phase.ROLLING_BACK:
            moves.append(Move(event.at - begun, state.label, state.reason if state.ended else ""))
    done = state.phase in (Phase.PROMOTED, Phase.ROLLED_BACK)
    return Rehearsal(
        outcome=rollout.OUTCOMES[state.phase] if done else "unfinished",
        why=state.reason if done else f"the recording ends at: {state.label}; {gates.summary(world.reports)}",
        seconds=world.now - begun,
        requests=int((recording.at <= world.now).sum()),
        exposed=world.exposed,
        moves=tuple(moves),
        reports=world.reports,
        not_asked=left,
    )


class _World:
    """Carries out at once what the machine asks for, and looks at the recording as a controller looks at the world."""

    def __init__(self, policy: Policy, recording: Recording, compare: Compare) -> None:
        self.policy, self.recording, self.compare = policy, recording, compare
        self.now, self.end = float(recording.at[0]), float(recording.at[-1])
        self.every = max(policy.rollout.look_every, (self.end - self.now) / LOOKS_MAX)
        self.known, self.exposed = gates.begin(policy), 0
        self.reports: tuple[GateReport, ...] = ()
        self.since, self.compared = self.now, 0  # of the stage
        self.stable = self.candidate = Counts(0, 0, epoch="recorded")
        self.pairs = [0, 0]

    def next(self, state: Rollout, number: int) -> Event | None:
        """What happens next to the rollout; None once it has ended, or the recording has."""
        if state.ended and not state.pending:
            return None
        if state.pending and state.pending[0].do is Do.CHECK:
            return Checked(self.now, number, Verdict.PASS, "not rehearsed")
        if state.pending:
            self.since, self.compared = self.now, 0
            return Done(self.now, number, state.pending[0].id)
        if self.now >= self.end:
            return None
        return self._look(state, number)

    def _look(self, state: Rollout, number: int) -> Looked:
        assert state.phase in LOOKED_AT
        before, self.now = self.now, self.now + self.every
        new = slice(*np.searchsorted(self.recording.at, [before, self.now], side="right"))
        first = int(np.searchsorted(self.recording.at, self.since, side="right"))
        stable, candidate, both = self._split(state, new)
        self.stable = _plus(self.stable, self.recording.stable[stable])
        self.candidate = _plus(self.candidate, self.recording.candidate[candidate])
        self.exposed += 0 if state.phase is Phase.SHADOW else len(candidate)
        gate = self.policy.rollout.gates.disagreement
        if gate is not None:
            apart = np.abs(self.recording.stable[both] - self.recording.candidate[both])
            self.pairs[0] += len(both)
            self.pairs[1] += int((~(apart <= gate.tolerance)).sum())  # no answer is another one
        evidence = Evidence(
            at=self.now,
            stable=self.stable,
            candidate=self.candidate,
            drift=self._drift(state, slice(first, new.stop)),
            pairs=Pairs(*self.pairs) if gate is not None and state.phase is not Phase.CANARY else None,
        )
        at = len(self.policy.rollout.stages) if state.phase is Phase.WATCHING else state.stage
        self.known, self.reports = gates.look(self.policy, at, self.known, evidence)
        verdict = worst(report.verdict for report in self.reports)
        deciding = [report for report in self.reports if report.verdict is verdict]
        return Looked(self.now, number, verdict, gates.summary(deciding))

    def _split(self, state: Rollout, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Whom the stable version answers, whom the candidate answers, and what both do: their numbers."""
        numbers = np.arange(rows.start, rows.stop)
        lots = self.recording.lots[rows]
        if state.phase is Phase.SHADOW:
            copied = numbers[lots < state.stop.shadow / 100]
            return numbers, copied, copied
        if state.phase is Phase.WATCHING:
            copied = numbers[lots < state.terms.watch_shadow / 100]
            return copied, numbers, copied
        return numbers[lots >= state.stop.weight / 100], numbers[lots < state.stop.weight / 100], numbers[:0]

    def _drift(self, state: Rollout, rows: slice) -> Drift | None:
        """A comparison of this stage's rows, whenever the gate may raise an alarm, and when the stage may be over."""
        gate = self.policy.rollout.gates.drift
        length = state.terms.watch_s if state.phase is Phase.WATCHING else state.stop.length_s
        due = (*shifts.LOOKS, 1.0)
        if gate is None or self.compared >= len(due) or self.now - self.since < due[self.compared] * length:
            return None
        stable, candidate, _ = self._split(state, rows)
        if min(len(stable), len(candidate)) < gate.rows_min:
            return None
        self.compared += 1
        return self.compare(stable, candidate)


def _plus(counts: Counts, answers: NDArray[np.float64]) -> Counts:
    """With these answers counted, too."""
    errors = counts.errors + int(np.isnan(answers).sum())
    return replace(counts, requests=counts.requests + len(answers), errors=errors)
