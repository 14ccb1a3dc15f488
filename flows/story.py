"""The story of a rollout, told from its ledger entries and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.rollout import evidence_of
from policies.events import Event, from_body
from policies.evidence import Counts
from policies.rollout import Rollout, step
from policies.verdict import GateReport, Verdict
from tasks.outcome import OUTCOMES
from tasks.ports import Entry, Look, Story


def reports_in(body: Mapping[str, Any]) -> tuple[GateReport, ...]:
    """The gates' reports that a ledger entry holds."""
    return tuple(GateReport(**{**report, "verdict": Verdict(report["verdict"])}) for report in body.get("reports", ()))


def weights(state: Rollout) -> tuple[int, int]:
    """Percent of the live traffic on the candidate, and percent copied to a shadow, as the rollout wants it now."""
    phase = state.phase.value
    if phase in ("shadow", "canary"):
        return state.stop.weight, state.stop.shadow
    if phase in ("promoting", "watching"):
        return 100, state.terms.watch_shadow
    return (100, 0) if phase == "promoted" else (0, 0)


def story_of(entries: Sequence[Entry]) -> Story:
    """The rollout that the entries tell of. Raises ValueError without any."""
    if not entries:
        raise ValueError("a story needs entries")
    looks: list[Look] = []
    checks: tuple[GateReport, ...] = ()
    events: list[tuple[float, str, str]] = []
    served: dict[str, Counts] = {}
    state: Rollout | None = None
    for entry in entries:
        event: Event = from_body(entry.kind, entry.body, entry.at, entry.number)
        before = state
        state, _ = step(state, event)
        evidence = evidence_of(entry)
        if entry.kind == "checked":
            checks = reports_in(entry.body)
        if evidence is not None and before is not None:
            weight, shadow = weights(before)
            reports = reports_in(entry.body)
            looks.append(Look(entry.at, before.label, weight, shadow, reports, evidence.stable, evidence.candidate))
            if evidence.candidate is not None:
                served[evidence.candidate.epoch] = evidence.candidate
        elif entry.kind != "ticked":
            events.append((entry.at, entry.kind, _words(entry, state)))
    assert state is not None
    live = served.get("live", Counts(0, 0))
    return Story(
        rollout=entries[0].rollout,
        model=state.model,
        version=state.candidate,
        baseline=state.stable,
        outcome=OUTCOMES.get(state.phase, str(state.phase)),
        reason=state.reason,
        started=entries[0].at,
        ended=entries[-1].at,
        looks=looks,
        checks=checks,
        events=events,
        candidate_requests=live.requests,
        candidate_errors=live.errors,
    )


def _words(entry: Entry, state: Rollout) -> str:
    said = next(
        (str(entry.body[key]) for key in ("says", "error", "reason", "effect", "by") if entry.body.get(key)), ""
    )
    return f"{state.label}: {said}" if said else state.label
