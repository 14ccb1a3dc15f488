"""The rollout machine: `step(state, event) -> (state, effects)`. Pure; time is a field of the event.

    PENDING → SHADOW → CANARY(1..n) → PROMOTING → WATCHING → PROMOTED
       │         └────────┴──────────────┴───────────┴→ ROLLING_BACK → ROLLED_BACK
       └→ REFUSED                    PROMOTING, ROLLING_BACK → HALTED (pages a person)

The state is never stored: it is the fold of the rollout's events. What the machine wants done stands in the state
until an event says that it is done, so that whoever takes over goes on where the last one stopped: `pending` holds
what the rollout waits for, in order; `outbox` what it does not wait for (aliases, tags, notices), to be retried until
it is done. An event with no entry in the table is illegal: it raises, and has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from policies import approval, freeze
from policies.approval import Question
from policies.events import (
    ENDED,
    LOOKED_AT,
    Answered,
    Checked,
    Do,
    Done,
    Effect,
    Event,
    Failed,
    Looked,
    Lost,
    Noted,
    Ordered,
    Phase,
    Quorum,
    Requested,
    Stop,
    Taken,
    Terms,
    Ticked,
)
from policies.policy import Policy
from policies.verdict import Verdict


def _percent(share: float) -> int:
    """At least one, if there is any share: a route without a candidate would be another thing."""
    return max(1, round(100 * share)) if share > 0 else 0


def terms(policy: Policy) -> Terms:
    """The machine's part of a policy."""
    rules = policy.rollout
    stops = tuple(
        Stop(
            phase=Phase.CANARY if stage.canary else Phase.SHADOW,
            weight=stage.canary.weight if stage.canary else 0,
            shadow=_percent(stage.share),
            length_s=stage.length_s,
        )
        for stage in rules.stages
    )
    return Terms(
        stops=stops,
        watch_s=rules.watch.length,
        watch_shadow=_percent(rules.watch.shadow),
        patience_s=rules.patience,
        grace_s=rules.grace,
        pause_max_s=rules.pause_max,
        on_exhausted=rules.on_exhausted,
        approvals=_quorum(policy),
        freeze=tuple(each.window() for each in policy.governance.freeze),
    )


def _quorum(policy: Policy) -> Quorum | None:
    asked = policy.governance.approvals
    if asked is None:
        return None
    return Quorum(asked.before, asked.by, asked.count, asked.expires, asked.wait, asked.on_silence)


@dataclass(frozen=True)
class Rollout:
    """The state of one rollout."""

    model: str
    candidate: str
    digest: str
    stable: str | None
    terms: Terms
    phase: Phase
    stage: int = 0
    since: float = 0.0  # the phase was entered; for stages: their route came into force
    paused_at: float | None = None
    blind_since: float | None = None  # the first of the unbroken looks that could not look
    verdict: Verdict = Verdict.HOLD
    pending: tuple[Effect, ...] = ()
    outbox: tuple[Effect, ...] = ()
    epoch: int = 0  # of the last change of traffic asked for
    deployed: bool = False
    aliased: bool = False
    unfinished: bool = False  # ended because something could not be done or looked at, not because of a verdict
    reason: str = ""
    holder: str = ""  # the controller that may act
    moved_by: int = 0  # the entry that made the last move from phase to phase, or stage to stage
    askers: tuple[str, ...] = ()  # who wants it in: they do not approve it
    evidence_hash: str = ""  # of the last look, or of the checks
    question: Question | None = None  # people are asked for approval
    approved: bool = False
    signed: str = ""  # the signature of the bytes, where one is asked for
    frozen: float | None = None  # it would have gone on, and may not before this time; its clocks run from there

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    @property
    def settled(self) -> bool:
        """Ended, and nothing is left to be done."""
        return self.ended and not self.pending and not self.outbox

    @property
    def stop(self) -> Stop:
        return self.terms.stops[self.stage]

    @property
    def in_force(self) -> bool:
        """The traffic is as this phase wants it, so looks count for it."""
        return self.phase in LOOKED_AT and not self.pending

    @property
    def label(self) -> str:
        """For people: `canary 25 %`, `shadow 100 %`, `watching`."""
        where = str(self.phase)
        if self.phase is Phase.CANARY:
            where = f"canary {self.stop.weight} %"
        if self.phase is Phase.SHADOW:
            where = f"shadow {self.stop.shadow} %"
        if self.frozen is not None:
            where += f", frozen until {datetime.fromtimestamp(self.frozen, UTC):%Y-%m-%d %H:%M} UTC"
        return f"{where}, waiting for approval" if self.question else where


# How an ended rollout is told to machines: JSON, tags, exit codes.
OUTCOMES = {
    Phase.PROMOTED: "promoted",
    Phase.ROLLED_BACK: "rolled_back",
    Phase.REFUSED: "refused",
    Phase.HALTED: "halted",
}


class Illegal(ValueError):
    """The event cannot happen in this state. Nothing was changed."""

    def __init__(self, state: Rollout | None, event: Event, why: str = "") -> None:
        where = state.phase if state else "no rollout"
        super().__init__(why or f"{type(event).__name__} is not possible in state '{where}'")


def begin(event: Requested) -> Rollout:
    """The rollout that a request begins."""
    # Without a stable version there is nothing to compare with, and nothing to go back to: no stages, no watch.
    agreed = event.terms if event.stable else replace(event.terms, stops=(), watch_s=0.0, watch_shadow=0)
    state = Rollout(event.model, event.candidate, event.digest, event.stable, agreed, Phase.PENDING, since=event.at)
    return _with(
        state, reason=event.reason, pending=(Effect(Do.CHECK, event.number),), moved_by=event.number,
        askers=(event.by,) if event.by else (), signed=event.signed,
    )  # fmt: skip


def step(state: Rollout | None, event: Event) -> tuple[Rollout, tuple[Effect, ...]]:
    """The state after the event, and the effects that it newly asks for. Raises `Illegal`, and nothing has changed."""
    if isinstance(event, Requested):
        if state is not None:
            raise Illegal(state, event)
        after = begin(event)
        return after, after.pending
    if state is None:
        raise Illegal(None, event)
    if isinstance(event, Taken):
        return _with(state, holder=event.by), ()
    if isinstance(event, Noted):
        return state, ()
    handler = _TABLE[state.phase].get(type(event))
    if handler is None:
        raise Illegal(state, event)
    after = handler(state, event)
    if after.pending is state.pending and after.outbox is state.outbox:
        return after, ()
    before = {effect.id for effect in (*state.pending, *state.outbox)}
    return after, tuple(effect for effect in (*after.pending, *after.outbox) if effect.id not in before)


def fold(events: Iterable[Event], state: Rollout | None = None) -> Rollout | None:
    """The state that the events lead to, from `state` on; None for no events."""
    for event in events:
        state, _ = step(state, event)
    return state


def _with(state: Rollout, **changes: Any) -> Rollout:
    """`dataclasses.replace` at a tenth of its cost: a fold is little else, and ledgers get long."""
    after = object.__new__(Rollout)
    vars(after).update(vars(state), **changes)
    return after


def due(state: Rollout) -> float | None:
    """When time alone changes the state (POSIX seconds); None once it has ended and waits for nothing."""
    if state.ended and not state.pending:
        return None
    limits = state.terms
    if state.phase is Phase.PENDING and not state.pending and state.frozen is not None:
        return state.frozen
    if state.phase is Phase.PENDING and state.question is None:
        return state.since + limits.check_s
    if state.pending:
        return state.since + limits.effect_s
    if state.paused_at is not None:
        return state.paused_at + limits.pause_max_s
    if state.question is not None:
        return _silence_ends(state)
    exhausted = state.since + _length(state) + limits.patience_s
    if state.blind_since is None:
        return exhausted
    graced = state.blind_since + limits.grace_s
    if state.frozen is not None:  # whom nobody can look at does not wait for the end of a freeze
        exhausted = min(exhausted, graced + limits.patience_s)
    return max(exhausted, graced)


def earliest(state: Rollout) -> float:
    """When the stage, or the watch, may end with a pass at the earliest (POSIX seconds)."""
    return state.since + _length(state)


def _silence_ends(state: Rollout) -> float:
    """How long people may take to answer. A candidate that nobody can look at does not wait for them that long."""
    assert state.question is not None
    assert state.terms.approvals is not None
    ends = state.question.at + state.terms.approvals.wait_s
    if state.blind_since is None:
        return ends
    graced = state.blind_since + state.terms.grace_s
    return max(min(ends, graced + state.terms.patience_s), graced)


def _length(state: Rollout) -> float:
    """The least time in seconds that the stage, or the watch, takes."""
    return state.terms.watch_s if state.phase is Phase.WATCHING else state.stop.length_s


# ---------------------------------------------------------------- moves


def _move(state: Rollout, event: Event, phase: Phase, **changes: Any) -> Rollout:
    fresh: dict[str, Any] = {
        "pending": (), "paused_at": None, "blind_since": None, "verdict": Verdict.HOLD, "question": None, "frozen": None
    }  # fmt: skip
    return _with(state, phase=phase, since=event.at, moved_by=event.number, **{**fresh, **changes})


def _post(state: Rollout, *effects: Effect) -> tuple[Effect, ...]:
    return (*state.outbox, *effects)


def _go_on(state: Rollout, event: Event, to: int, order: str = "") -> Rollout:
    """On to stage `to`, or to the promotion; where people must agree first it asks them, and stays where it is."""
    frozen = freeze.until(state.terms.freeze, event.at)
    if frozen is not None and order:
        raise Illegal(state, event, _frozen(state.terms, event.at, frozen))
    if frozen is not None:
        return _freeze(state, frozen)
    state = _with(state, frozen=None) if state.frozen is not None else state
    quorum, question = state.terms.approvals, state.question
    if quorum is not None and not state.approved and approval.needed(state.terms, to):
        if question is None or (question.to, question.ordered) != (to, bool(order)):
            question = Question(event.number, event.at, to, state.evidence_hash, bool(order))
            return _with(state, question=question, reason=order or state.reason, moved_by=event.number)
        if not approval.granted(quorum, question, event.at):
            return _on_time(state, event)
        state = _with(state, approved=True)
    return _promote(state, event, order) if order else _enter_stage(state, event, to)


def _freeze(state: Rollout, until: float) -> Rollout:
    """It waits for the end of the freeze; only from then on do patience and the time to answer run."""
    if state.frozen == until:
        return state
    question = state.question
    if question is not None:
        question = replace(question, at=max(question.at, until))
    since = state.since if state.phase is Phase.PENDING else max(state.since, until - _length(state))
    return _with(state, frozen=until, since=since, question=question)


def _frozen(limits: Terms, at: float, until: float) -> str:
    because = freeze.why(limits.freeze, at)
    told = f" ({because})" if because else ""
    return f"nothing new is let on before {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M} UTC{told}"


def _enter_stage(state: Rollout, event: Event, stage: int) -> Rollout:
    if stage >= len(state.terms.stops):
        passed = "every gate passed" if state.terms.stops else state.reason or "there is no stage to pass"
        return _promote(state, event, passed if state.stable else "first version; the checks passed")
    stop = state.terms.stops[stage]
    route = Effect(Do.ROUTE, event.number, weight=stop.weight, shadow=stop.shadow)
    return _move(state, event, stop.phase, stage=stage, pending=(route,), epoch=event.number)


def _promote(state: Rollout, event: Event, reason: str) -> Rollout:
    route = Effect(Do.ROUTE, event.number, weight=100, shadow=state.terms.watch_shadow)
    return _move(state, event, Phase.PROMOTING, pending=(route,), epoch=event.number, reason=reason)


def _watch(state: Rollout, event: Event) -> Rollout:
    if state.terms.watch_s <= 0:
        return _proven(_aliased(state, event), event)
    return _move(_aliased(state, event), event, Phase.WATCHING)


def _aliased(state: Rollout, event: Event) -> Rollout:
    return _with(state, aliased=True, outbox=_post(state, Effect(Do.ALIAS, event.number, version=state.candidate)))


def _proven(state: Rollout, event: Event) -> Rollout:
    route = Effect(Do.ROUTE, event.number, version=state.candidate)
    old = (Effect(Do.UNDEPLOY, event.number, version=state.stable),) if state.stable else ()
    tell = Effect(Do.TELL, event.number, text=state.reason)
    return _move(state, event, Phase.PROMOTED, pending=(route,), epoch=event.number, outbox=_post(state, *old, tell))


def _refuse(state: Rollout, event: Event, reason: str, unfinished: bool = False) -> Rollout:
    tell = Effect(Do.TELL, event.number, text=reason)
    return _move(state, event, Phase.REFUSED, reason=reason, unfinished=unfinished, outbox=_post(state, tell))


def _roll_back(state: Rollout, event: Event, reason: str, guilty: bool, unfinished: bool = False) -> Rollout:
    """Traffic first, everything else after it. `guilty`: the evidence is against the bytes."""
    route = Effect(Do.ROUTE, event.number, version=state.stable)
    # An alias still on its way to the candidate must not arrive any more.
    outbox = tuple(effect for effect in state.outbox if effect.do is not Do.ALIAS)
    if guilty:
        outbox = (*outbox, Effect(Do.QUARANTINE, event.number, text=reason))
    return _move(
        state, event, Phase.ROLLING_BACK,
        pending=(route,), epoch=event.number, reason=reason, outbox=outbox, unfinished=unfinished,
    )  # fmt: skip


def _rolled_back(state: Rollout, event: Event) -> Rollout:
    restore = (Effect(Do.ALIAS, event.number, version=state.stable),) if state.aliased else ()
    after = (
        Effect(Do.UNDEPLOY, event.number, version=state.candidate),
        Effect(Do.TELL, event.number, text=state.reason),
    )
    return _move(state, event, Phase.ROLLED_BACK, outbox=_post(state, *restore, *after))


def _halt(state: Rollout, event: Event, reason: str) -> Rollout:
    page = Effect(Do.PAGE, event.number, text=reason)
    tell = Effect(Do.TELL, event.number, text=reason)
    waiting = tuple(effect for effect in state.outbox if effect.do is not Do.ALIAS)  # a person decides who is champion
    return _move(state, event, Phase.HALTED, reason=reason, unfinished=True, outbox=(*waiting, page, tell))


# ---------------------------------------------------------------- handlers


def _without(effects: tuple[Effect, ...], name: str) -> tuple[Effect, ...]:
    return tuple(effect for effect in effects if effect.id != name)


def _on_checked(state: Rollout, event: Event) -> Rollout:
    assert isinstance(event, Checked)
    if not any(effect.do is Do.CHECK for effect in state.pending):
        raise Illegal(state, event)
    if event.verdict is Verdict.PASS:
        pending = (Effect(Do.DEPLOY, event.number),)
        return _with(state, pending=pending, moved_by=event.number, evidence_hash=event.evidence_hash)
    return _refuse(state, event, event.says, unfinished=event.verdict is Verdict.ERROR)


def _on_done(state: Rollout, event: Event) -> Rollout:
    assert isinstance(event, Done)
    if any(effect.id == event.effect for effect in state.outbox):
        return _with(state, outbox=_without(state.outbox, event.effect))
    head = state.pending[0] if state.pending else None
    if head is None or head.id != event.effect or head.do is Do.CHECK:
        raise Illegal(state, event)
    state = _with(state, pending=state.pending[1:])
    if state.phase is Phase.PENDING:
        return _go_on(_with(state, deployed=True), event, 0)
    if state.phase is Phase.PROMOTING:
        return _watch(state, event)
    if state.phase is Phase.ROLLING_BACK:
        return _rolled_back(state, event)
    if state.phase is Phase.PROMOTED:
        return state
    return _with(state, since=event.at)  # a stage's clock runs from when its route is in force


def _on_failed(state: Rollout, event: Event) -> Rollout:
    """What may be tried again stays where it is, until its time is up; only a final failure moves the machine."""
    assert isinstance(event, Failed)
    name = event.effect
    if not any(effect.id == name for effect in (*state.pending, *state.outbox)):
        raise Illegal(state, event)
    if not event.final:
        return state
    if any(effect.id == name for effect in state.outbox):
        return _with(state, outbox=_without(state.outbox, name))
    return _cannot(state, event, event.error)


def _cannot(state: Rollout, event: Event, error: str) -> Rollout:
    """What the rollout waits for will not come."""
    if state.phase is Phase.PENDING:
        if any(effect.do is Do.DEPLOY for effect in state.pending):
            return _roll_back(state, event, f"could not start the version: {error}", guilty=False, unfinished=True)
        return _refuse(state, event, f"the checks could not be finished: {error}", unfinished=True)
    if state.phase is Phase.PROMOTING:
        return _halt(state, event, f"promotion stopped half-way, nobody knows who answers: {error}")
    if state.phase is Phase.ROLLING_BACK:
        return _halt(state, event, f"the traffic could not be taken back: {error}")
    if state.phase is Phase.PROMOTED:
        return _halt(state, event, f"promoted, but the former version could not be taken off the route: {error}")
    return _roll_back(state, event, f"the traffic could not be set: {error}", guilty=False, unfinished=True)


def _on_looked(state: Rollout, event: Event) -> Rollout:
    assert isinstance(event, Looked)
    if event.verdict is Verdict.FAIL:
        return _roll_back(state, event, event.says, guilty=True)
    blind = None
    if event.verdict is Verdict.ERROR:
        blind = event.at if state.blind_since is None else state.blind_since
    frozen = state.frozen if state.frozen is not None and event.at < state.frozen else None
    if blind is None and state.blind_since is not None and frozen is None:
        # Time in which nobody could look is no patience spent, as far as the source's grace goes.
        excused = min(max(event.at - max(state.blind_since, state.since), 0.0), state.terms.grace_s)
        state = _with(state, since=state.since + excused)
    state = _with(state, verdict=event.verdict, blind_since=blind, evidence_hash=event.evidence_hash, frozen=frozen)
    if not state.in_force or state.paused_at is not None:
        return state
    if event.verdict is Verdict.PASS and event.at >= state.since + _length(state):
        if state.phase is Phase.WATCHING:
            return _proven(state, event)
        if state.question is None or not state.question.ordered:
            return _go_on(state, event, state.stage + 1)
    return _on_time(state, event)


def _on_time(state: Rollout, event: Event) -> Rollout:
    limit = due(state)
    if limit is None or event.at < limit:
        return state
    if state.phase is Phase.PENDING and not state.pending and state.frozen is not None:
        return _go_on(state, event, 0)
    if state.question is not None and not state.pending and state.paused_at is None:
        return _unanswered(state, event)
    if state.phase is Phase.PENDING or state.pending:
        return _cannot(state, event, f"not done after {event.at - state.since:.0f} s")
    if state.paused_at is not None:
        return _roll_back(state, event, f"paused for {event.at - state.paused_at:.0f} s", guilty=False)
    reason = f"{state.label}: not enough evidence in {event.at - state.since:.0f} s (last verdict: {state.verdict})"
    if state.terms.on_exhausted == "pause":
        return _with(state, paused_at=event.at, reason=reason, moved_by=event.number)
    return _roll_back(state, event, reason, guilty=False, unfinished=state.verdict is Verdict.ERROR)


def _unanswered(state: Rollout, event: Event) -> Rollout:
    assert state.question is not None
    assert state.terms.approvals is not None
    given = approval.standing(state.terms.approvals, state.question, event.at)
    answered = f"{len(given)} of {state.terms.approvals.count} approvals"
    reason, then = f"{answered} in {event.at - state.question.at:.0f} s", state.terms.approvals.on_silence
    blind = event.at < state.question.at + state.terms.approvals.wait_s
    if blind:
        reason, then = f"nobody could look while it waited for approval ({reason})", state.terms.on_exhausted
    if then == "pause" and state.phase is not Phase.PENDING:
        return _with(state, paused_at=event.at, reason=reason, moved_by=event.number)
    return _roll_back(state, event, reason, guilty=False, unfinished=blind)


def _on_answered(state: Rollout, event: Event) -> Rollout:
    assert isinstance(event, Answered)
    quorum, question, paused = state.terms.approvals, state.question, state.paused_at is not None
    why = approval.objection(quorum, question, event, state.digest, state.askers, paused)
    if why is not None:
        raise Illegal(state, event, why)
    assert question is not None
    if event.answer == "refuse":
        because = f": {event.reason}" if event.reason else ""
        return _roll_back(state, event, f"refused by {event.by}{because}", guilty=False)
    state = _with(state, question=replace(question, given=approval.with_approval(question, event)))
    if state.phase is Phase.PENDING or question.ordered:
        return _go_on(state, event, question.to, state.reason if question.ordered else "")
    return state  # the next look that passes goes on: an approval does not stand for evidence


def _on_ordered(state: Rollout, event: Event) -> Rollout:
    assert isinstance(event, Ordered)
    why = f"{event.order} ordered" + (f": {event.reason}" if event.reason else "")
    staged = state.phase in (Phase.SHADOW, Phase.CANARY)
    if event.order == "abort":
        started = state.deployed or any(effect.do is Do.DEPLOY for effect in state.pending)
        if state.phase is Phase.PENDING and not started:
            return _refuse(state, event, why)
        return _roll_back(state, event, why, guilty=False)
    if event.order == "promote" and staged and not (state.question and state.question.ordered):
        askers = (*state.askers, event.by) if event.by else state.askers
        return _go_on(_with(state, askers=askers), event, len(state.terms.stops), why)
    if event.order == "pause" and staged and state.paused_at is None:
        return _with(state, paused_at=event.at, reason=why, moved_by=event.number)
    if event.order == "resume" and state.paused_at is not None:
        # A pause costs the stage none of its time, and whoever resumes it gives it its patience anew.
        waited = max(event.at - max(state.paused_at, state.since), 0.0)
        since = max(state.since + waited, event.at - _length(state))
        ends = event.at if state.frozen is None else max(event.at, state.frozen)
        question = replace(state.question, at=ends) if state.question else None
        blind = None if state.blind_since is None else event.at
        return _with(
            state, paused_at=None, since=since, blind_since=blind, reason=why, moved_by=event.number, question=question
        )
    raise Illegal(state, event)


def _on_lost(state: Rollout, event: Event) -> Rollout:
    assert isinstance(event, Lost)
    return _roll_back(state, event, event.says, guilty=False, unfinished=True)


Handler = Callable[[Rollout, Event], Rollout]
_EFFECTS: Mapping[type[Event], Handler] = {Done: _on_done, Failed: _on_failed}
_TIMED: Mapping[type[Event], Handler] = {**_EFFECTS, Ticked: _on_time}
_WATCHED: Mapping[type[Event], Handler] = {**_TIMED, Looked: _on_looked, Ordered: _on_ordered, Lost: _on_lost}
_STAGED: Mapping[type[Event], Handler] = {**_WATCHED, Answered: _on_answered}
_TABLE: Mapping[Phase, Mapping[type[Event], Handler]] = {
    Phase.PENDING: {**_TIMED, Checked: _on_checked, Ordered: _on_ordered, Answered: _on_answered},
    Phase.SHADOW: _STAGED,
    Phase.CANARY: _STAGED,
    Phase.PROMOTING: {**_TIMED, Ordered: _on_ordered, Lost: _on_lost},
    Phase.WATCHING: _WATCHED,
    Phase.PROMOTED: _TIMED,
    Phase.ROLLING_BACK: _TIMED,
    Phase.ROLLED_BACK: _EFFECTS,
    Phase.REFUSED: _EFFECTS,
    Phase.HALTED: _EFFECTS,
}
