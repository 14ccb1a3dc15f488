"""A rollout played on recorded traffic: the same machine and the same gates, on the recording's own clock.

What cannot be known from a recording is not asked, and said: how fast the real server answers under load, labels that
come later, what people would say. Nothing here touches anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from policies import gates, rollout, shifts
from policies.events import LOOKED_AT, Checked, Do, Done, Event, Looked, Phase, Requested
from policies.evidence import Counts, Drift, Evidence, Pairs
from policies.policy import Drifting, Policy
from policies.rollout import Rollout
from policies.verdict import GateReport, Verdict, worst

LOOKS_MAX = 5_000  # of one rehearsal; a longer one looks less often than its policy says
_COMPARISONS_MAX = 250  # while a stage's patience is spent; a longer one is compared less often than live
Compare = Callable[[NDArray[np.int64], NDArray[np.int64]], Drift | None]


@dataclass(frozen=True)
class Recording:
    """Requests in the order of their times (POSIX seconds), what the stable version predicted for each, and what the
    candidate predicts for the same (NaN is no prediction, which an answer may be without), and whom each failed to
    answer. `lots` is a number in [0, 1) for each, by chance but for good: who is below the share meets the candidate,
    also when it grows."""

    at: NDArray[np.float64]
    lots: NDArray[np.float64]
    stable: NDArray[np.float64]
    candidate: NDArray[np.float64]
    stable_failed: NDArray[np.bool_]
    candidate_failed: NDArray[np.bool_]

    def __post_init__(self) -> None:
        sizes = {
            len(each)
            for each in (self.at, self.lots, self.stable, self.candidate, self.stable_failed, self.candidate_failed)
        }
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
    """The whole rollout, from the recording's first request on. `compare` tells how far the rows that the stable
    version answered (the first argument, by number, oldest first) are from the candidate's; None without any rows.
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
        self.compared_at, self.counts_from = -inf, self.now + policy.rollout.burn_in
        self.rows: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = [], []  # of each version, to compare
        self.stable = self.candidate = Counts(0, 0, epoch="recorded")
        self.pairs = [0, 0]

    def next(self, state: Rollout, number: int) -> Event | None:
        """What happens next to the rollout; None once it has ended, or the recording has."""
        if state.ended and not state.pending:
            return None
        if state.pending and state.pending[0].do is Do.CHECK:
            return Checked(self.now, number, Verdict.PASS, "not rehearsed")
        if state.pending:
            return Done(self.now, number, state.pending[0].id)
        if self.now >= self.end:
            return None
        return self._look(state, number)

    def _look(self, state: Rollout, number: int) -> Looked:
        assert state.phase in LOOKED_AT
        before, self.now = self.now, self.now + self.every
        new = slice(*np.searchsorted(self.recording.at, [before, self.now], side="right"))
        stable, candidate, both = self._split(state, new)
        self.stable = _plus(self.stable, self.recording.stable_failed[stable])
        self.candidate = _plus(self.candidate, self.recording.candidate_failed[candidate])
        for rows, numbers, failed in (
            (self.rows[0], stable, self.recording.stable_failed),
            (self.rows[1], candidate, self.recording.candidate_failed),
        ):
            rows.append(numbers[~failed[numbers] & (self.recording.at[numbers] >= self.counts_from)])
        self.exposed += 0 if state.phase is Phase.SHADOW else len(candidate)
        gate = self.policy.rollout.gates.disagreement
        if gate is not None:
            apart = np.abs(self.recording.stable[both] - self.recording.candidate[both])
            self.pairs[0] += len(both)
            self.pairs[1] += int((~(apart <= gate.tolerance)).sum())  # no answer is another one
        at = len(self.policy.rollout.stages) if state.phase is Phase.WATCHING else state.stage
        evidence = Evidence(
            at=self.now,
            stable=self.stable,
            candidate=self.candidate,
            drift=self._drift(state, at),
            pairs=Pairs(*self.pairs) if gate is not None and state.phase is not Phase.CANARY else None,
        )
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

    def _drift(self, state: Rollout, at: int) -> Drift | None:
        """A comparison of the rollout's rows so far, when its word may move the rollout: where the live controller's
        comparisons may raise an alarm, and where they may end the stage. Those between the two change nothing."""
        gate = self.policy.rollout.gates.drift
        if gate is None:
            return None
        every = shifts.EVERY_S
        if not self._may_alarm(gate, state, at):
            every = max(every, state.terms.patience_s / _COMPARISONS_MAX)
            if self.now < rollout.earliest(state):
                return None
        if self.now - self.compared_at < every:
            return None
        seen = self.compare(*(np.concatenate(rows) for rows in self.rows))
        self.compared_at = self.now if seen is not None else self.compared_at
        return seen

    def _may_alarm(self, gate: Drifting, state: Rollout, at: int) -> bool:
        """Whether the gate would take a comparison now for one that may raise an alarm."""
        entered = self.known.stage == at
        spent, elapsed_s = (self.known.shift.spent, self.now - self.known.staged) if entered else (0, 0.0)
        enough = min(sum(map(len, rows)) for rows in self.rows) >= gate.rows_min
        length_s = state.terms.watch_s if state.phase is Phase.WATCHING else state.stop.length_s
        return enough and shifts.may_alarm(spent, elapsed_s, length_s)


def _plus(counts: Counts, failed: NDArray[np.bool_]) -> Counts:
    """With these requests counted, too."""
    return replace(counts, requests=counts.requests + len(failed), errors=counts.errors + int(failed.sum()))
