"""What the ledger's entries say of a rollout: its policy, its state, its evidence, its story."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from policies import gates, rollout
from policies.events import Event, Noted, Phase, from_body
from policies.evidence import Counts, Evidence
from policies.policy import Policy
from policies.rollout import OUTCOMES, Rollout, step
from policies.verdict import GateReport, Verdict
from tasks.ports import BadInput, Entry, Ledger, Look, Page, PortError, Story

PAUSED = " (paused)"


class Unreadable(PortError):
    """Another version of lockgate wrote it into the ledger, and this one cannot read it. Nobody else waits for it."""


def policy_of(entries: Sequence[Entry]) -> Policy:
    """The policy that the rollout was requested under: it is in the first entry, whatever became of the file.

    Raises Unreadable, and BadInput where the entries are of something else than a rollout.
    """
    if entries[0].kind != "requested":
        raise BadInput(f"'{entries[0].rollout}' is no rollout; name one as `lockgate status` shows it")
    try:
        return Policy.model_validate(entries[0].body["policy"])
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors())
        raise Unreadable(f"the policy of rollout {entries[0].rollout} cannot be read: {told}") from exc


def target_of(entries: Sequence[Entry]) -> str:
    """Where the rollout's model runs."""
    return str(entries[0].body.get("request", {}).get("target", "local"))


def is_way_back(entries: Sequence[Entry]) -> bool:
    """Whether the rollout brings a former version back, and delivers none."""
    return "back_from" in entries[0].body


def run_of(entries: Sequence[Entry]) -> str | None:
    """The id of the Prefect run that shows the rollout. (`flow_run` is one whose cancellation takes it back, too.)"""
    body = entries[0].body
    found = body.get("flow_run") or body.get("shown_by")
    return str(found) if found else None


_folded: dict[str, Rollout] = {}  # by the hash of the last entry taken in, which stands for all that came before it
_FOLDED_MAX = 512


def fold(entries: Sequence[Entry]) -> Rollout | None:
    """The state of the rollout that the entries tell of, from its first one on; None without entries.

    Whoever asks again (a reconciler does so every few seconds) pays for the new entries only. Raises Unreadable.
    """
    known, state = len(entries), None
    while known and (state := _folded.get(entries[known - 1].hash)) is None:  # other threads may clear it meanwhile
        known -= 1
    try:
        state = rollout.fold((from_body(e.kind, e.body, e.at, e.number) for e in entries[known:]), state)
    except (ValueError, TypeError, KeyError) as exc:
        raise Unreadable(f"rollout {entries[0].rollout} cannot be read: {exc}") from exc
    if state is not None:
        if len(_folded) >= _FOLDED_MAX:
            _folded.clear()
        _folded[entries[-1].hash] = state
    return state


def readable(entries: Sequence[Entry]) -> Rollout | None:
    """As `fold`; None also for a rollout that cannot be read: whoever looks for another one looks on."""
    try:
        return fold(entries)
    except Unreadable:
        return None


def state_of(ledger: Ledger, name: str) -> Rollout:
    """The state of a rollout that the ledger lists. Raises Unreadable, PortError."""
    state = fold(ledger.read(name))
    assert state is not None  # only rollouts that were requested are listed
    return state


def label_of(state: Rollout) -> str:
    """Where the rollout stands, as `Rollout.label`, and that it is paused if it is."""
    return f"{state.label}{PAUSED}" if state.paused_at is not None else state.label


def evidence_of(entry: Entry) -> Evidence | None:
    """The evidence that the entry's look was decided on, if it is a look."""
    body = entry.body.get("evidence")
    return gates.evidence_from(body) if body is not None else None


def reports_in(body: Mapping[str, Any]) -> tuple[GateReport, ...]:
    """The gates' reports that a ledger entry holds."""
    return tuple(GateReport(**{**report, "verdict": Verdict(report["verdict"])}) for report in body.get("reports", ()))


def weights(state: Rollout) -> tuple[int, int] | None:
    """Percent of the live traffic on the candidate, and percent copied to a shadow, as the rollout wants it now.

    None once it has halted: it wants nothing any more, and the traffic is as it was.
    """
    phase = state.phase.value
    if phase == "halted":
        return None
    if phase in ("shadow", "canary"):
        return state.stop.weight, state.stop.shadow
    if phase in ("promoting", "watching"):
        return 100, state.terms.watch_shadow
    return (100, 0) if phase == "promoted" else (0, 0)


def share_done(state: Rollout) -> float:
    """How far the rollout is, in percent of its stages and its watch."""
    steps = len(state.terms.stops) + 2
    if state.ended:
        return 100.0
    if state.phase is Phase.PENDING:
        return 0.0
    if state.phase in (Phase.PROMOTING, Phase.WATCHING):
        return 100.0 * (steps - 1) / steps
    return 100.0 * (state.stage + 0.5) / steps


def story_of(entries: Sequence[Entry]) -> Story:
    """The rollout that the entries tell of. Raises ValueError without any."""
    if not entries:
        raise ValueError("a story needs entries")
    looks: list[Look] = []
    checks: tuple[GateReport, ...] = ()
    events: list[tuple[float, str, str]] = []
    pages: list[Page] = []
    served: dict[str, Counts] = {}
    state: Rollout | None = None
    ended = entries[0].at
    for entry in entries:
        event: Event = from_body(entry.kind, entry.body, entry.at, entry.number)
        if isinstance(event, Noted):
            pages.append(Page(event.at, event.what, event.link, event.error))
            continue
        ended, before = entry.at, state
        state, _ = step(state, event)
        evidence = evidence_of(entry)
        if entry.kind == "checked":
            checks = reports_in(entry.body)
        if evidence is not None and before is not None:
            traffic = weights(before)
            assert traffic is not None  # what has halted is not looked at
            weight, shadow = traffic
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
        ended=ended,
        looks=looks,
        checks=checks,
        events=events,
        candidate_requests=live.requests,
        candidate_errors=live.errors,
        pages=pages,
    )


def _words(entry: Entry, state: Rollout) -> str:
    said = next(
        (str(entry.body[key]) for key in ("says", "error", "reason", "effect", "by") if entry.body.get(key)), ""
    )
    return f"{state.label}: {said}" if said else state.label
