"""Every state that the rollout machine can reach, and every step between them: enumerated, not sampled.

Breadth-first from each kind of rollout, with every event that can be written down in each state, at each of a few
distances in time. All durations are small whole numbers, and time goes on by 0 or 1 or `LONG` (longer than every
deadline), so every deadline is met just before it, on it, after it and long after it. What makes no difference to the
machine is taken out of the states: absolute time, the absolute numbers of entries, what is only said to people.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from policies.approval import Question
from policies.events import (
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
from policies.freeze import Window
from policies.rollout import Illegal, Rollout, step
from policies.verdict import Verdict

NOW = 1000.0  # each state is looked at as if it were this late
LONG = 4.0  # longer than every deadline of the terms below; beyond it one age is as good as another
DISTANCES = (0.0, 1.0, LONG)

STOPS = (Stop(Phase.SHADOW, 0, 100, 1.0), Stop(Phase.CANARY, 5, 100, 1.0), Stop(Phase.CANARY, 50, 0, 1.0))
USUAL = Terms(STOPS, 1.0, 50, 1.0, 3.0, 2.0, "rollback", check_s=1.0, effect_s=1.0)


OLD = 1.0  # an approval of this age has expired, a question is over
ONE = Quorum("canary", ("ann", "asker"), 1, OLD, OLD, "pause")
TWO = Quorum("promote", ("ann", "ben", "asker"), 2, OLD, OLD, "rollback")
HASH = "of the evidence"
FREEZE = Window(NOW + 1.0, NOW + 3.0)


def requested(terms: Terms = USUAL, stable: str | None = "1") -> Requested:
    return Requested(NOW, 1, "m", "2", "digest", stable, terms, by="asker")


KINDS_OF_ROLLOUT = {
    "usual": requested(),
    "pauses when the evidence does not suffice": requested(replace(USUAL, on_exhausted="pause", stops=STOPS[1:2])),
    "without a watch": requested(replace(USUAL, watch_s=0.0, watch_shadow=0, stops=STOPS[1:2])),
    "without stages": requested(replace(USUAL, stops=())),
    "first version": requested(stable=None),
    "approved before the canary": requested(replace(USUAL, stops=STOPS[:1], watch_s=0.0, approvals=ONE)),
    "approved by two before promotion": requested(replace(USUAL, stops=STOPS[1:2], watch_s=0.0, approvals=TWO)),
    "frozen": requested(replace(USUAL, stops=STOPS[1:2], watch_s=0.0, freeze=(FREEZE,))),
    "frozen, approved before the canary": requested(
        replace(USUAL, stops=STOPS[:1], watch_s=0.0, approvals=ONE, freeze=(FREEZE,))
    ),
    "first version, approved": requested(replace(USUAL, approvals=TWO), stable=None),
}


@dataclass(frozen=True)
class Past:
    """What has happened on the way to a state, as far as a promise speaks of it."""

    passed: frozenset[int] = frozenset()  # stages that a pass, seen in them after their full length, allowed to leave
    promote_ordered: bool = False
    failed_look: bool = False
    share: int = 0  # percent of the live traffic that the candidate has at most, after the last route asked for
    asked: int = 0  # the stage that people are asked about, counted from 1 (0: nobody was asked yet)
    agreed: tuple[tuple[str, float], ...] = ()  # who has approved since they were asked, and when
    consented: bool = False  # enough of them had, when it went on


@dataclass(frozen=True)
class Node:
    state: Rollout
    past: Past


@dataclass(frozen=True)
class Edge:
    """One legal step, as it was taken: `after` with its true times and numbers, `asked` newly."""

    before: Rollout
    past: Past
    event: Event
    after: Rollout
    asked: tuple[Effect, ...]
    then: Past


@dataclass(frozen=True)
class Space:
    """All that can be reached: the states (each with what led there), the legal steps, the illegal events."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    illegal: tuple[tuple[Rollout, Event], ...]


@cache
def explore(first: Requested) -> Space:
    """The whole space of one kind of rollout."""
    gc.disable()  # it makes a million small values, all of which stay: looking for garbage takes longer than the rest
    try:
        return _explore(first)
    finally:
        gc.enable()


def _explore(first: Requested) -> Space:
    state, asked = step(None, first)
    start = Node(_plain(state, NOW), _past(Past(), None, first, state, asked))
    seen, queue = {start}, deque([start])
    edges: list[Edge] = []
    illegal: list[tuple[Rollout, Event]] = []
    while queue:
        node = queue.popleft()
        for event in events_in(node.state):
            try:
                after, asked = step(node.state, event)
            except Illegal:
                illegal.append((node.state, event))
                continue
            then = _past(node.past, node.state, event, after, asked)
            edges.append(Edge(node.state, node.past, event, after, asked, then))
            found = Node(_plain(after, event.at), _plain_past(then, event.at))
            if found not in seen:
                seen.add(found)
                queue.append(found)
    return Space(tuple(seen), tuple(edges), tuple(illegal))


def events_in(state: Rollout) -> tuple[Event, ...]:
    """Everything that could be written next, sensible or not, at every distance in time."""
    effects = (*state.pending, *state.outbox)
    number = 1 + max([state.epoch, state.moved_by, *(effect.asked_by for effect in effects)])
    return _events(number, (*(effect.id for effect in effects), "0:route:"), state.question is not None)


@cache
def _events(number: int, names: tuple[str, ...], asked: bool) -> tuple[Event, ...]:
    return tuple(_all_events(number, names, asked))


def answers(at: float, number: int) -> Iterator[Answered]:
    """Of everybody: those who may approve, who asked, who ordered, and a stranger; of the right thing and of others."""
    for who in ("ann", "ben", "asker", "stranger"):
        yield Answered(at, number, who, "approve", "digest", HASH)
        yield Answered(at, number, who, "refuse", "digest", HASH)
    yield Answered(at, number, "ann", "approve", "another digest", HASH)
    yield Answered(at, number, "ann", "approve", "digest", "of other evidence")
    yield Answered(at, number, "ann", "shrug", "digest", HASH)


def _all_events(number: int, names: tuple[str, ...], asked: bool) -> Iterator[Event]:
    for distance in DISTANCES:
        at = NOW + distance
        yield Ticked(at, number)
        yield Lost(at, number, "the lease ran out")
        yield Taken(at, number, "another")
        yield Noted(at, number, "shadow", error="no rows")
        yield replace(requested(), at=at, number=number)
        for verdict in Verdict:
            yield Checked(at, number, verdict, "checked", HASH)
            yield Looked(at, number, verdict, "looked", HASH)
        for order in ("promote", "abort", "pause", "resume", "dance"):
            yield Ordered(at, number, order, "because", "boss")
        yield from answers(at, number) if asked else [Answered(at, number, "ann", "approve", "digest", HASH)]
        for name in names:
            yield Done(at, number, name)
            yield Failed(at, number, name, "broken", final=False)
            yield Failed(at, number, name, "broken", final=True)


def _plain_past(past: Past, now: float) -> Past:
    agreed = tuple(sorted((who, NOW - min(now - when, OLD)) for who, when in past.agreed))
    return replace(past, agreed=agreed) if agreed != past.agreed else past


def share_of(state: Rollout, route: Effect) -> int:
    """The candidate's percentage of the live traffic under the route."""
    if route.version is not None:
        return 100 if route.version == state.candidate else 0
    return route.weight


def _past(past: Past, before: Rollout | None, event: Event, after: Rollout, asked: tuple[Effect, ...]) -> Past:
    if isinstance(event, Looked) and before is not None:
        past = replace(past, failed_look=past.failed_look or event.verdict is Verdict.FAIL)
        in_stage = before.phase in (Phase.SHADOW, Phase.CANARY) and not before.pending
        if in_stage and event.verdict is Verdict.PASS and event.at >= before.since + before.stop.length_s:
            past = replace(past, passed=past.passed | {before.stage})
    if isinstance(event, Ordered) and event.order == "promote":
        past = replace(past, promote_ordered=True)
    past = _asked(past, before, event, after)
    routes = [effect for effect in asked if effect.do is Do.ROUTE]
    return replace(past, share=share_of(after, routes[-1])) if routes else past


def _asked(past: Past, before: Rollout | None, event: Event, after: Rollout) -> Past:
    """What people were asked and have agreed to, counted anew beside the machine."""
    quorum = after.terms.approvals
    if quorum is None or before is None:
        return past
    if isinstance(event, Answered) and event.answer == "approve":
        past = replace(past, agreed=(*((w, t) for w, t in past.agreed if w != event.by), (event.by, event.at)))
    if before.question is not None and after.question is None:
        alive = [who for who, when in past.agreed if event.at - when < quorum.expires_s and who in quorum.by]
        enough = len(set(alive) - {"asker"}) >= quorum.count
        return replace(past, agreed=(), asked=0, consented=past.consented or enough)
    if after.question is not None and (before.question is None or after.question.number != before.question.number):
        return replace(past, agreed=(), asked=after.question.to + 1)
    return past


def _plain(state: Rollout, now: float) -> Rollout:
    """The state as if it were `NOW`, entries counted anew, nothing said: equal for all that behave equally."""
    asked = {state.question.number} if state.question else set()
    numbers = sorted({state.epoch, state.moved_by, 0, *asked, *(e.asked_by for e in (*state.pending, *state.outbox))})
    anew = {number: place for place, number in enumerate(numbers)}

    def plain(effects: tuple[Effect, ...]) -> tuple[Effect, ...]:
        return tuple(
            replace(effect, asked_by=anew[effect.asked_by], text="")
            if effect.text or anew[effect.asked_by] != effect.asked_by
            else effect
            for effect in effects
        )

    def age(at: float | None, of: float) -> float:
        return max(min(of - at, LONG), -LONG) if at is not None else 0.0

    # While it is paused, what counts of the stage's age is its age at the pause.
    paused_at = None if state.paused_at is None else NOW - age(state.paused_at, now)
    since = (
        paused_at - age(state.since, state.paused_at or 0.0) if paused_at is not None else NOW - age(state.since, now)
    )
    return replace(
        state,
        since=NOW if state.ended else since,
        paused_at=paused_at,
        blind_since=None if state.blind_since is None else NOW - age(state.blind_since, now),
        pending=plain(state.pending),
        outbox=plain(state.outbox),
        epoch=anew[state.epoch],
        moved_by=anew[state.moved_by],
        verdict=Verdict.ERROR if state.verdict is Verdict.ERROR else Verdict.HOLD,
        reason="",
        holder="",
        askers=tuple(sorted({"asker"} & set(state.askers))),  # the boss may not approve anyway
        question=_plain_question(state.question, now, anew),
        frozen=None if state.frozen is None else NOW - age(state.frozen, now),
        terms=_plain_terms(
            state.terms, tuple(NOW - age(each, now) for w in state.terms.freeze for each in (w.start, w.end))
        ),
    )


@cache
def _plain_terms(terms: Terms, freeze: tuple[float, ...]) -> Terms:
    """The same terms, their one freeze as old, or as far ahead, as it is."""
    return replace(terms, freeze=(Window(*freeze),)) if freeze else terms


def _plain_question(asked: Question | None, now: float, anew: dict[int, int]) -> Question | None:
    if asked is None:
        return None
    given = tuple(sorted((who, NOW - min(now - when, OLD)) for who, when in asked.given))
    return replace(asked, number=anew[asked.number], at=NOW - min(now - asked.at, OLD), given=given)
