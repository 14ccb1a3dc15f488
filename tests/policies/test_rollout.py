"""The rollout machine's promises, checked in every state that it can reach and on every step between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import pairwise, product

import pytest

from policies import audit
from policies.events import (
    ENDED,
    KINDS,
    LOOKED_AT,
    Answered,
    Checked,
    Do,
    Done,
    Event,
    Failed,
    Looked,
    Lost,
    Noted,
    Ordered,
    Phase,
    Requested,
    Stop,
    Taken,
    Terms,
    Ticked,
    from_body,
    to_body,
)
from policies.freeze import until
from policies.rollout import Illegal, Rollout, due, fold, step
from policies.verdict import Verdict
from tests.policies.rollout_space import (
    HASH,
    KINDS_OF_ROLLOUT,
    NOW,
    STOPS,
    TWO,
    USUAL,
    Edge,
    Space,
    explore,
    requested,
    share_of,
)

UPWARD = {Phase.SHADOW, Phase.CANARY, Phase.PROMOTING, Phase.WATCHING, Phase.PROMOTED}


@pytest.fixture(scope="module", params=KINDS_OF_ROLLOUT, ids=lambda name: name.replace(" ", "-"))
def space(request: pytest.FixtureRequest) -> Space:
    return explore(KINDS_OF_ROLLOUT[request.param])


def states(space: Space) -> Iterable[Rollout]:
    return {node.state for node in space.nodes}


def entered(edge: Edge, phase: Phase) -> bool:
    return edge.after.phase is phase and edge.before.phase is not phase


def told(edge: Edge) -> str:
    """What to show of a step that breaks a promise."""
    return f"{edge.event}\n  from {edge.before}\n  to   {edge.after}"


# ---------------------------------------------------------------- the space itself


def test_the_enumeration_reaches_every_phase_and_every_kind_of_step() -> None:
    """Else the promises below would hold of too little."""
    found = [explore(first) for first in KINDS_OF_ROLLOUT.values()]
    assert {state.phase for space in found for state in states(space)} == set(Phase)
    assert {type(edge.event) for space in found for edge in space.edges} == set(KINDS.values()) - {Requested}
    asked = {effect.do for space in found for edge in space.edges for effect in edge.asked}
    assert asked == set(Do) - {Do.CHECK}
    usual = {state for state in states(explore(KINDS_OF_ROLLOUT["usual"])) if state.phase in LOOKED_AT}
    combinations = {(s.label, bool(s.pending), s.paused_at is not None, s.blind_since is not None) for s in usual}
    stages = {f"canary {stop.weight} %" for stop in STOPS if stop.phase is Phase.CANARY} | {"shadow 100 %"}
    assert combinations >= set(product(stages, (True, False), (True, False), (True, False)))


def test_a_refused_event_has_changed_nothing(space: Space) -> None:
    """The state before is a value; so is everything in it. A second try is refused in the same words."""
    assert space.illegal
    for state, event in space.illegal[:: max(1, len(space.illegal) // 2000)]:
        values = [getattr(state, field.name) for field in fields(state)]
        with pytest.raises(Illegal) as refused:
            step(state, event)
        told_why = isinstance(event, Answered) or "nothing new is let on before" in str(refused.value)
        assert told_why or type(event).__name__ in str(refused.value)
        assert [getattr(state, field.name) for field in fields(state)] == values
        assert hash(state) == hash(replace(state))


def test_only_a_request_begins_a_rollout_and_nothing_begins_it_again(space: Space) -> None:
    for event in (Ticked(NOW, 1), Taken(NOW, 1, "c"), Lost(NOW, 1, ""), Ordered(NOW, 1, "abort")):
        with pytest.raises(Illegal, match="no rollout"):
            step(None, event)
    refused = {state for state, event in space.illegal if isinstance(event, Requested)}
    assert refused == set(states(space))


def test_an_event_is_the_same_after_it_has_been_in_the_ledger(space: Space) -> None:
    events = {edge.event for edge in space.edges} | {event for _, event in space.illegal}
    for event in events:
        kind, body = to_body(event)
        _, again = audit.written(body)
        assert from_body(kind, again, event.at, event.number) == event


def test_unknown_kinds_are_refused_and_further_keys_are_not_the_machines() -> None:
    with pytest.raises(ValueError, match="'quarantined'"):
        from_body("quarantined", {}, 0.0, 1)
    kind, body = to_body(Looked(1.0, 2, Verdict.PASS, "fine"))
    assert from_body(kind, {**body, "evidence": {"n": 1}}, 1.0, 2) == Looked(1.0, 2, Verdict.PASS, "fine")


def test_a_state_is_the_fold_of_its_events() -> None:
    events: list[Event] = [
        requested(),
        Checked(NOW, 2, Verdict.PASS, "fine"),
        Done(NOW, 3, "2:deploy:"),
        Done(NOW, 4, "3:route:"),
        Looked(NOW + 1, 5, Verdict.PASS, "fine"),
    ]
    state: Rollout | None = None
    for event in events:
        state, _ = step(state, event)
    assert fold(events) == state
    assert state is not None
    assert (state.phase, state.stop.weight) == (Phase.CANARY, 5)
    assert fold([]) is None


# ---------------------------------------------------------------- promotion


def test_nothing_is_promoted_without_a_pass_in_every_stage_or_an_order(space: Space) -> None:
    seen = 0
    for edge in space.edges:
        if entered(edge, Phase.PROMOTING):
            seen += 1
            all_stages = frozenset(range(len(edge.before.terms.stops)))
            assert edge.then.promote_ordered or edge.then.passed >= all_stages, told(edge)
    assert seen


def test_without_stages_only_passed_checks_and_a_finished_deployment_promote(space: Space) -> None:
    for edge in space.edges:
        if entered(edge, Phase.PROMOTING) and not edge.before.terms.stops:
            assert isinstance(edge.event, Done) or edge.then.consented, told(edge)
            assert edge.after.deployed
        if edge.before.phase is Phase.PENDING and edge.after.pending != edge.before.pending and edge.after.pending:
            passed = isinstance(edge.event, Checked) and edge.event.verdict is Verdict.PASS
            assert passed or isinstance(edge.event, Done | Failed | Ticked | Ordered | Answered), told(edge)


def test_a_stage_is_left_upward_only_by_a_pass_after_its_full_length_or_by_an_order(space: Space) -> None:
    for edge in space.edges:
        before, event = edge.before, edge.event
        up = edge.after.phase in UPWARD and (edge.after.phase, edge.after.stage) != (before.phase, before.stage)
        if before.phase not in LOOKED_AT or not up:
            continue
        if isinstance(event, Ordered):
            assert event.order == "promote", told(edge)
            assert before.phase is not Phase.WATCHING
            continue
        if isinstance(event, Answered):  # a promotion that a person ordered, and others have approved
            assert before.question is not None, told(edge)
            assert before.question.ordered, told(edge)
            assert edge.then.promote_ordered
            continue
        assert isinstance(event, Looked), told(edge)
        assert event.verdict is Verdict.PASS, told(edge)
        length = before.terms.watch_s if before.phase is Phase.WATCHING else before.stop.length_s
        assert event.at - before.since >= length, told(edge)
        assert not before.pending, told(edge)
        assert before.paused_at is None, told(edge)


def test_stages_come_in_order_and_none_is_left_out(space: Space) -> None:
    for edge in space.edges:
        if edge.after.phase in (Phase.SHADOW, Phase.CANARY):
            entering = edge.before.phase is Phase.PENDING
            assert edge.after.stage in ((0,) if entering else (edge.before.stage, edge.before.stage + 1)), told(edge)


@pytest.mark.parametrize("verdict", [Verdict.HOLD, Verdict.ERROR, Verdict.FAIL])
def test_no_evidence_no_source_and_bad_evidence_never_move_anything_upward(space: Space, verdict: Verdict) -> None:
    seen = 0
    for edge in space.edges:
        event = edge.event
        if isinstance(event, Looked | Checked) and event.verdict is verdict:
            seen += 1
            same = (edge.after.phase, edge.after.stage) == (edge.before.phase, edge.before.stage)
            assert same or edge.after.phase not in UPWARD, told(edge)
            assert all(share_of(edge.after, effect) == 0 for effect in edge.asked if effect.do is Do.ROUTE), told(edge)
    assert seen


def thawed(edge: Edge) -> bool:
    """The freeze is over in which a version whose checks have passed waited for its first stage."""
    return edge.before.phase is Phase.PENDING and edge.before.frozen is not None


def test_time_alone_never_promotes(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Ticked) and not thawed(edge):
            assert edge.after.phase not in UPWARD or edge.after.phase is edge.before.phase, told(edge)


# ---------------------------------------------------------------- failure


def test_no_failure_ever_raises_the_candidates_share(space: Space) -> None:
    """Neither what failed, nor a lost route, nor a bad look, nor time, nor a pause or an abort."""
    for edge in space.edges:
        event = edge.event
        good = (
            isinstance(event, Done)
            or (isinstance(event, Looked | Checked) and event.verdict is Verdict.PASS)
            or (isinstance(event, Ordered) and event.order == "promote")
            or (isinstance(event, Answered) and event.answer == "approve" and edge.then.consented)
            or (isinstance(event, Ticked) and thawed(edge))
        )
        if not good:
            assert edge.then.share <= edge.past.share, told(edge)


def test_bad_evidence_rolls_back_at_once_and_puts_the_bytes_in_quarantine(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Looked) and edge.event.verdict is Verdict.FAIL:
            assert edge.after.phase is Phase.ROLLING_BACK, told(edge)
            (route,) = edge.after.pending
            assert (route.do, route.version) == (Do.ROUTE, edge.before.stable), told(edge)
            assert edge.asked[0] == route, "the traffic comes first"
            assert [effect.do for effect in edge.asked[1:]] == [Do.QUARANTINE]


def test_only_bad_evidence_puts_bytes_in_quarantine(space: Space) -> None:
    for edge in space.edges:
        if any(effect.do is Do.QUARANTINE for effect in edge.asked):
            assert edge.then.failed_look, told(edge)


def test_an_outage_shorter_than_its_grace_never_rolls_back(space: Space) -> None:
    """As long as the source is down, and has not been for its grace, time and looks leave the rollout where it is."""
    seen = 0
    for edge in space.edges:
        event, before = edge.event, edge.before
        blind = isinstance(event, Ticked) or (isinstance(event, Looked) and event.verdict is Verdict.ERROR)
        if not blind or not before.in_force or before.paused_at is not None:
            continue
        since = before.blind_since
        if since is None and isinstance(event, Looked):
            since = event.at
        if since is not None and event.at < since + before.terms.grace_s:
            seen += 1
            assert edge.after.phase is before.phase, told(edge)
            assert edge.after.paused_at is None, told(edge)
    assert seen or not any(state.in_force for state in states(space))


def test_a_failure_while_promoting_halts_and_pages(space: Space) -> None:
    """The candidate may be the only healthy copy: going back could be the wrong way."""
    halted = 0
    for edge in space.edges:
        if edge.before.phase is not Phase.PROMOTING:
            continue
        final = isinstance(edge.event, Failed) and edge.event.final
        if final and any(effect.id == getattr(edge.event, "effect", "") for effect in edge.before.pending):
            halted += 1
            assert edge.after.phase is Phase.HALTED, told(edge)
        if edge.after.phase is Phase.ROLLING_BACK:
            assert isinstance(edge.event, Lost) or getattr(edge.event, "order", "") == "abort", told(edge)
    assert halted


def test_every_halt_pages_a_person(space: Space) -> None:
    for edge in space.edges:
        if entered(edge, Phase.HALTED):
            assert Do.PAGE in [effect.do for effect in edge.asked], told(edge)


def test_a_failure_that_may_pass_leaves_everything_as_it_is(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Failed) and not edge.event.final:
            assert edge.after == edge.before, told(edge)
            assert edge.asked == ()


def test_what_failed_for_infrastructure_says_so_and_what_evidence_or_people_decided_does_not(space: Space) -> None:
    for edge in space.edges:
        event = edge.event
        if edge.after.phase is edge.before.phase or edge.after.phase in UPWARD:
            continue
        if isinstance(event, Ordered) or (isinstance(event, Looked | Checked) and event.verdict is Verdict.FAIL):
            assert not edge.after.unfinished, told(edge)
        if isinstance(event, Lost) or (isinstance(event, Failed) and event.final):
            assert edge.after.unfinished, told(edge)


# ---------------------------------------------------------------- people


def test_abort_is_possible_until_the_end_unless_the_way_back_has_begun(space: Space) -> None:
    aborted = {edge.before for edge in space.edges if isinstance(edge.event, Ordered) and edge.event.order == "abort"}
    expected = {state for state in states(space) if state.phase not in {*ENDED, Phase.ROLLING_BACK}}
    assert aborted == expected


def test_an_abort_takes_the_traffic_away_or_never_gives_any(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Ordered) and edge.event.order == "abort":
            assert edge.after.phase in (Phase.ROLLING_BACK, Phase.REFUSED), told(edge)
            assert edge.then.share == 0, told(edge)
            if edge.after.phase is Phase.REFUSED:
                assert not edge.before.deployed


def test_an_order_that_nobody_knows_is_refused(space: Space) -> None:
    orders = {edge.event.order for edge in space.edges if isinstance(edge.event, Ordered)}
    assert orders <= {"promote", "abort", "pause", "resume"}


def test_a_paused_rollout_goes_down_or_stays_where_it_is(space: Space) -> None:
    for edge in space.edges:
        ordered = isinstance(edge.event, Ordered) and edge.event.order in ("promote", "resume")
        if edge.before.paused_at is not None and not ordered and edge.after.phase in UPWARD:
            assert (edge.after.phase, edge.after.stage) == (edge.before.phase, edge.before.stage), told(edge)


def test_a_page_that_was_made_or_not_changes_nothing(space: Space) -> None:
    noted = [edge for edge in space.edges if isinstance(edge.event, Noted)]
    assert {edge.before for edge in noted} == set(states(space))
    assert all(edge.after == edge.before and edge.asked == () for edge in noted)


def test_whoever_takes_a_rollout_over_changes_only_who_holds_it(space: Space) -> None:
    takers = [edge for edge in space.edges if isinstance(edge.event, Taken)]
    assert {edge.before for edge in takers} == set(states(space))
    for edge in takers:
        assert edge.after == replace(edge.before, holder="another"), told(edge)
        assert edge.asked == ()


# ---------------------------------------------------------------- approvals


def test_without_enough_approvals_nothing_goes_past_what_the_policy_names(space: Space) -> None:
    """Of people whom it names, none of whom asked, of these bytes and this evidence, none of them expired."""
    quorum = next(iter(states(space))).terms.approvals
    seen = 0
    for edge in space.edges:
        if quorum is None:
            assert edge.after.question is None, told(edge)
            continue
        past_it = entered(edge, Phase.PROMOTING) or (
            quorum.before == "canary" and 0 == edge.past.share < edge.then.share
        )
        if past_it:
            seen += 1
            assert edge.then.consented, told(edge)
    assert seen or quorum is None


def test_only_who_may_approves_and_only_what_was_shown(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Answered) and edge.event.answer == "approve":
            assert edge.event.by in ("ann", "ben"), told(edge)
            assert (edge.event.digest, edge.event.evidence_hash) == ("digest", HASH), told(edge)
        elif isinstance(edge.event, Answered):
            assert edge.event.by != "stranger", told(edge)


def test_who_orders_the_promotion_does_not_approve_it() -> None:
    state = asked(replace(USUAL, stops=STOPS[1:2], approvals=replace(TWO, by=("ann", "ben", "boss"))))
    state, _ = step(state, Ordered(NOW + 1, 20, "promote", "now", "boss"))
    assert state.question is not None
    assert state.question.ordered
    with pytest.raises(Illegal, match="somebody else"):
        step(state, Answered(NOW + 1, 21, "boss", "approve", "digest", HASH))


def test_nothing_stands_before_the_way_back_while_people_are_asked(space: Space) -> None:
    """A failing look, a lost route, an abort and a refusal by anybody on the list take the traffic back at once."""
    for state in states(space):
        if state.question is None:
            continue
        assert state.terms.approvals is not None
        ways: list[Event] = [Ordered(NOW, 99, "abort")]
        ways += [Answered(NOW, 99, who, "refuse", "?", "?") for who in state.terms.approvals.by]
        if state.phase in LOOKED_AT:
            ways += [Looked(NOW, 99, Verdict.FAIL, "worse", HASH), Lost(NOW, 99, "the lease ran out")]
        for event in ways:
            after, effects = step(state, event)
            assert after.phase is Phase.ROLLING_BACK, f"{event} in {state}"
            assert effects[0] == after.pending[0], "the traffic comes first"
            assert effects[0].version == state.stable
            assert after.question is None


def test_an_approval_alone_moves_no_traffic_where_gates_are_asked(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Answered) and edge.event.answer == "approve" and edge.asked:
            question = edge.before.question
            assert question is not None
            assert question.ordered or edge.before.phase is Phase.PENDING, told(edge)


def test_an_approval_that_has_expired_does_not_count() -> None:
    state = asked(replace(USUAL, stops=STOPS[1:2], approvals=replace(TWO, wait_s=10.0)))
    state, _ = step(state, Answered(NOW + 2, 20, "ann", "approve", "digest", HASH))
    state, _ = step(state, Answered(NOW + 5, 21, "ben", "approve", "digest", HASH))
    state, _ = step(state, Looked(NOW + 5, 22, Verdict.PASS, "fine", HASH))
    assert state.phase is Phase.CANARY
    state, _ = step(state, Answered(NOW + 5, 23, "ann", "approve", "digest", HASH))
    state, _ = step(state, Looked(NOW + 5, 24, Verdict.PASS, "fine", HASH))
    assert state.phase is Phase.PROMOTING


def asked(agreed: Terms) -> Rollout:
    """A canary that has passed, and waits for people."""
    ready = (Checked(NOW, 2, Verdict.PASS, "fine"), Done(NOW, 3, "2:deploy:"), Done(NOW, 4, "3:route:"))
    state = fold((requested(agreed), *ready, Looked(NOW + 1, 5, Verdict.PASS, "fine", HASH)))
    assert state is not None
    assert state.question is not None
    assert state.label == "canary 5 %, waiting for approval"
    return state


# ---------------------------------------------------------------- ends


def test_time_alone_ends_every_rollout(space: Space) -> None:
    """Every state that has not ended has a deadline, at which something changes, and the deadlines lead to an end."""
    for state in states(space):
        current, number = state, 1000
        for _ in range(10):
            limit = due(current)
            if limit is None:
                break
            number += 1
            after, _ = step(current, Ticked(limit, number))
            assert after != current, f"nothing changes at {limit} in {current}"
            current = after
        assert current.ended, f"{state} does not end"
        assert due(state) is not None or state.ended


def test_before_its_deadline_time_changes_nothing(space: Space) -> None:
    for edge in space.edges:
        if isinstance(edge.event, Ticked):
            limit = due(edge.before)
            if limit is not None and edge.event.at < limit:
                assert edge.after == edge.before, told(edge)


def test_nothing_is_dated_after_now(space: Space) -> None:
    """A stage that began in the future would last longer than the policy says."""
    for edge in space.edges:
        dates = (edge.after.paused_at, edge.after.blind_since)
        assert all(date is None or date <= edge.event.at for date in dates), told(edge)
        assert edge.after.since <= max(edge.event.at, edge.after.frozen or edge.event.at), told(edge)


def test_in_a_freeze_nothing_new_is_let_on(space: Space) -> None:
    cold = [edge for edge in space.edges if until(edge.before.terms.freeze, edge.event.at) is not None]
    assert bool(cold) == bool(space.nodes[0].state.terms.freeze)
    for edge in cold:
        assert edge.then.share <= edge.past.share, told(edge)
        assert not any(effect.shadow and effect.version is None for effect in edge.asked), told(edge)


def test_what_has_ended_stays_ended(space: Space) -> None:
    for edge in space.edges:
        if edge.before.ended and edge.after.phase is not edge.before.phase:
            assert (edge.before.phase, edge.after.phase) == (Phase.PROMOTED, Phase.HALTED), told(edge)


def test_what_has_ended_waits_for_nothing_but_the_winners_last_route(space: Space) -> None:
    for state in states(space):
        if state.ended and state.pending:
            (route,) = state.pending
            assert (state.phase, route.do, route.version) == (Phase.PROMOTED, Do.ROUTE, state.candidate)


def test_every_end_is_told_once(space: Space) -> None:
    for edge in space.edges:
        tells = [effect for effect in edge.asked if effect.do is Do.TELL]
        assert len(tells) == (1 if edge.after.ended and edge.after.phase is not edge.before.phase else 0), told(edge)


def test_effects_have_names_of_their_own(space: Space) -> None:
    """What is reported done is one effect, not two."""
    for state in states(space):
        names = [effect.id for effect in (*state.pending, *state.outbox)]
        assert len(set(names)) == len(names), names


def test_each_change_of_traffic_carries_the_number_of_its_entry_as_epoch(space: Space) -> None:
    for edge in space.edges:
        for effect in edge.asked:
            if effect.do is Do.ROUTE:
                assert effect.asked_by == edge.after.epoch == edge.event.number, told(edge)
        if not any(effect.do is Do.ROUTE for effect in edge.asked):
            assert edge.after.epoch == edge.before.epoch, told(edge)


def test_the_way_back_leads_to_the_stable_version_and_names_it_again(space: Space) -> None:
    for edge in space.edges:
        if entered(edge, Phase.ROLLED_BACK):
            assert isinstance(edge.event, Done), told(edge)
            assert edge.past.share == 0, told(edge)
            aliases = [effect.version for effect in edge.after.outbox if effect.do is Do.ALIAS]
            assert aliases == ([edge.before.stable] if edge.before.aliased else []), told(edge)
            undeployed = [effect.version for effect in edge.after.outbox if effect.do is Do.UNDEPLOY]
            assert undeployed == [edge.before.candidate], told(edge)


def test_the_stable_version_runs_until_the_candidate_is_proven(space: Space) -> None:
    for edge in space.edges:
        if any(effect.do is Do.UNDEPLOY and effect.version == edge.before.stable for effect in edge.asked):
            assert entered(edge, Phase.PROMOTED), told(edge)


# ---------------------------------------------------------------- clocks that jump back


def test_a_clock_that_jumps_back_promotes_nothing_and_breaks_nothing(space: Space) -> None:
    for state in states(space):
        for event in (
            Ticked(NOW - 100, 1000),
            *(Looked(NOW - 100, 1000, verdict, "looked") for verdict in Verdict),
            Lost(NOW - 100, 1000, "lost"),
        ):
            try:
                after, _ = step(state, event)
            except Illegal:
                continue
            same = (after.phase, after.stage) == (state.phase, state.stage)
            assert same or after.phase is Phase.ROLLING_BACK, f"{event} in {state}"


# ---------------------------------------------------------------- one story, told in full


def test_a_good_version_from_request_to_champion() -> None:
    """The happy path in entries, so that a person can read what the machine does."""
    steps: list[tuple[Event, str]] = [
        (requested(), "pending"),
        (Checked(NOW, 2, Verdict.PASS, "fine"), "pending"),
        (Done(NOW, 3, "2:deploy:"), "shadow 100 %"),
        (Done(NOW, 4, "3:route:"), "shadow 100 %"),
        (Looked(NOW + 0.5, 5, Verdict.PASS, "fine"), "shadow 100 %"),
        (Looked(NOW + 1, 6, Verdict.PASS, "fine"), "canary 5 %"),
        (Done(NOW + 1, 7, "6:route:"), "canary 5 %"),
        (Looked(NOW + 2, 8, Verdict.PASS, "fine"), "canary 50 %"),
        (Done(NOW + 2, 9, "8:route:"), "canary 50 %"),
        (Looked(NOW + 3, 10, Verdict.PASS, "fine"), "promoting"),
        (Done(NOW + 3, 11, "10:route:"), "watching"),
        (Looked(NOW + 4, 12, Verdict.PASS, "fine"), "promoted"),
        (Done(NOW + 4, 13, "12:route:2"), "promoted"),
        (Done(NOW + 4, 14, "11:alias:2"), "promoted"),
        (Done(NOW + 4, 15, "12:undeploy:1"), "promoted"),
        (Done(NOW + 4, 16, "12:tell:"), "promoted"),
    ]
    state: Rollout | None = None
    for event, label in steps:
        state, _ = step(state, event)
        assert state.label == label, event
        assert state.settled is (event.number == 16)
    assert all(earlier.number < later.number for (earlier, _), (later, _) in pairwise(steps))
    assert state is not None
    assert state.terms == USUAL


# ---------------------------------------------------------------- promises that the machine does not keep yet


def looks(*verdicts: tuple[float, Verdict], **changes: object) -> Rollout:
    """A canary whose route is in force since NOW, with 100 s to pass, 100 s of patience and 50 s of grace, after the
    looks at the given seconds."""
    agreed = replace(USUAL, stops=(Stop(Phase.CANARY, 5, 0, 100.0),), patience_s=100.0, grace_s=50.0, **changes)
    ready = (Checked(NOW, 2, Verdict.PASS, "fine"), Done(NOW, 3, "2:deploy:"), Done(NOW, 4, "3:route:"))
    looked = (Looked(NOW + at, 5 + place, verdict, "looked") for place, (at, verdict) in enumerate(verdicts))
    state = fold((requested(agreed), *ready, *looked))
    assert state is not None
    return state


def test_an_outage_shorter_than_its_grace_rolls_nothing_back_when_it_ends() -> None:
    """Blind from 160 s to 205 s, 45 s of 50 s of grace; the first look after it cannot pass at once."""
    state = looks((150.0, Verdict.HOLD), (160.0, Verdict.ERROR), (205.0, Verdict.HOLD))
    assert state.phase is Phase.CANARY


def test_a_resume_after_the_evidence_did_not_suffice_gives_the_stage_time_again() -> None:
    state = looks((200.0, Verdict.HOLD), on_exhausted="pause", pause_max_s=1000.0)
    assert state.paused_at is not None
    state, _ = step(state, Ordered(NOW + 300, 90, "resume"))
    state, _ = step(state, Looked(NOW + 301, 91, Verdict.HOLD, "looked"))
    assert state.paused_at is None


def test_a_resume_of_a_wait_in_which_nobody_could_look_gives_the_grace_anew() -> None:
    state = looks((90.0, Verdict.HOLD), (150.0, Verdict.PASS), on_exhausted="pause", pause_max_s=5000.0, approvals=TWO)
    assert state.question is not None
    for event in (
        Looked(NOW + 160, 90, Verdict.ERROR, "no answer"),
        Ordered(NOW + 161, 91, "pause"),
        Ordered(NOW + 1000, 92, "resume"),
        Ticked(NOW + 1001, 93),
    ):
        state, _ = step(state, event)
    assert state.paused_at is None


def test_a_version_that_is_taken_back_is_not_named_champion_any_more() -> None:
    for name, first in KINDS_OF_ROLLOUT.items():
        for state in states(explore(first)):
            if state.phase in (Phase.ROLLING_BACK, Phase.HALTED):
                champions = [e.version for e in state.outbox if e.do is Do.ALIAS]
                assert state.candidate not in champions, f"{name}: {state}"


def test_whatever_is_waited_for_has_a_deadline() -> None:
    for name, first in KINDS_OF_ROLLOUT.items():
        for state in states(explore(first)):
            assert not state.pending or due(state) is not None, f"{name}: {state}"
