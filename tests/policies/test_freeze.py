"""A freeze lets nothing new on, and holds nothing back that goes back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from policies import rollout
from policies.approval import Question
from policies.events import (
    Answered,
    Checked,
    Done,
    Event,
    Looked,
    Ordered,
    Phase,
    Quorum,
    Requested,
    Ticked,
    from_body,
    to_body,
)
from policies.freeze import Window, until, why, window
from policies.policy import PolicyError
from policies.policy_yaml import parse
from policies.rollout import Illegal, Rollout, due, step, terms
from policies.verdict import Verdict
from policies.words import explain

POLICY = parse(
    """
policy: p
rollout:
  stages: [shadow: {share: 1.0, for: 10s}, canary: {weight: 10, for: 10s}]
  patience: 100s
  watch: {for: 10s}
"""
)
FREEZE = Window(1000.0, 5000.0, why="holidays")


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


# ---------------------------------------------------------------- times


def test_a_window_of_the_week_is_there_every_week_and_only_then() -> None:
    weekend = [window("fri 16:00", "mon 08:00", "weekend")]
    assert until(weekend, at("2026-11-27T15:59")) is None
    for inside in ("2026-11-27T16:00", "2026-11-29T12:00", "2026-11-30T07:59"):  # Friday, Sunday, Monday
        assert until(weekend, at(inside)) == at("2026-11-30T08:00"), inside
    assert until(weekend, at("2026-11-30T08:00")) is None
    assert until(weekend, at("2031-05-24T12:00")) == at("2031-05-26T08:00")
    assert why(weekend, at("2026-11-29T12:00")) == "weekend"


def test_windows_that_touch_are_one() -> None:
    assert until([Window(0, 10), Window(10, 20), Window(15, 30)], 5) == 30
    assert until([Window(0, 10), Window(11, 20)], 5) == 10


def test_weekly_windows_that_leave_no_time_between_them_are_refused() -> None:
    text = """
policy: p
rollout: {stages: [canary: {weight: 10, for: 5s}]}
governance: {freeze: [{from: 'fri 16:00', to: 'mon 08:00'}, {from: '%s', to: 'fri 16:00'}]}
"""
    with pytest.raises(PolicyError, match="no time between them"):
        parse(text % "mon 08:00")
    parse(text % "mon 08:01")


@pytest.mark.parametrize(
    ("begins", "ends", "told"),
    [
        ("2026-12-24T00:00", "2026-12-25T00:00Z", "no time zone"),
        ("2026-12-25T00:00Z", "2026-12-24T00:00Z", "before it begins"),
        ("fri 16:00", "fri 16:00", "whole week"),
        ("fri 25:00", "mon 08:00", "write it like: fri 16:00"),
        ("fri 24:30", "mon 08:00", "write it like: fri 16:00"),
        ("fri 16:00", "2026-12-24T00:00Z", "no time"),
        ("soon", "later", "write 2026-12-23T18:00Z"),
    ],
)
def test_a_window_that_cannot_be_is_told_when_the_policy_is_read(begins: str, ends: str, told: str) -> None:
    text = (
        "policy: p\nrollout: {stages: [canary: {weight: 10, for: 5s}]}\ngovernance: {freeze: [{from: '%s', to: '%s'}]}"
    )
    with pytest.raises(PolicyError, match=told):
        parse(text % (begins, ends))


def test_yaml_s_own_times_are_understood_and_the_policy_says_them_in_words() -> None:
    policy = parse(
        "policy: p\nrollout: {stages: [canary: {weight: 10, for: 5s}]}\n"
        "governance: {freeze: [{from: 2026-12-23T18:00:00Z, to: 2027-01-02T08:00:00Z, why: holidays}]}"
    )
    assert until(terms(policy).freeze, at("2026-12-24T00:00")) == at("2027-01-02T08:00")
    assert any("holidays" in line for line in explain(policy))
    assert type(policy).model_validate(policy.model_dump(mode="json", by_alias=True)).digest == policy.digest


# ---------------------------------------------------------------- the machine


def frozen_terms(**more: Any) -> Any:
    return replace(terms(POLICY), freeze=(FREEZE,), **more)


def run(state: Rollout | None, *events: Event) -> Rollout:
    for event in events:
        state, _ = step(state, event)
    assert state is not None
    return state


def deployed(when: float, **more: Any) -> Rollout:
    """Checked and deployed at this time."""
    state = run(None, Requested(when, 1, "m", "2", "d", "1", frozen_terms(**more)), Checked(when, 2, Verdict.PASS, ""))
    return run(state, Done(when, 3, state.pending[0].id))


def in_shadow(when: float) -> Rollout:
    state = deployed(when)
    return run(state, Done(when, 4, state.pending[0].id))


def test_a_request_in_a_freeze_waits_for_its_end_and_then_goes_on() -> None:
    state = deployed(2000.0)
    assert (state.phase, state.pending, due(state)) == (Phase.PENDING, (), 5000.0)
    assert "frozen until 1970-01-01 01:23 UTC" in state.label
    assert run(state, Ticked(4999.0, 4)) == state
    assert run(state, Ticked(5000.0, 4)).phase is Phase.SHADOW


def test_a_stage_that_has_passed_stays_where_it_is_and_goes_on_with_the_first_look_after_the_freeze() -> None:
    state = run(in_shadow(995.0), Looked(1006.0, 5, Verdict.PASS, ""))
    assert (state.phase, state.pending, due(state)) == (Phase.SHADOW, (), 5100.0)
    state = run(state, Ticked(4000.0, 6), Looked(4999.0, 7, Verdict.PASS, ""))
    assert state.phase is Phase.SHADOW
    assert run(state, Looked(5000.0, 8, Verdict.PASS, "")).phase is Phase.CANARY
    assert (
        run(state, Looked(5099.0, 8, Verdict.HOLD, ""), Looked(5100.0, 9, Verdict.HOLD, "")).phase is Phase.ROLLING_BACK
    )


def test_nothing_that_goes_back_waits() -> None:
    waiting = run(in_shadow(995.0), Looked(1006.0, 5, Verdict.PASS, ""))
    assert run(waiting, Looked(2000.0, 6, Verdict.FAIL, "harm")).phase is Phase.ROLLING_BACK
    assert run(waiting, Ordered(2000.0, 6, "abort", "")).phase is Phase.ROLLING_BACK
    assert run(deployed(2000.0), Ordered(2001.0, 4, "abort", "")).phase is Phase.ROLLING_BACK
    # Who can't be looked at is taken back when the source's grace is over, freeze or not.
    blind = run(waiting, Looked(2000.0, 6, Verdict.ERROR, ""))
    limit = due(blind)
    assert limit is not None
    assert limit < 5000.0
    assert run(blind, Ticked(limit, 7)).phase is Phase.ROLLING_BACK
    # Without evidence the stage's patience runs out as ever.
    assert run(in_shadow(995.0), Looked(1200.0, 5, Verdict.HOLD, "")).phase is Phase.ROLLING_BACK


def test_a_person_s_word_does_not_end_a_freeze() -> None:
    with pytest.raises(Illegal, match=r"before 1970-01-01 01:23 UTC \(holidays\)"):
        step(in_shadow(995.0), Ordered(2000.0, 5, "promote", ""))


def test_an_approval_that_came_counts_after_the_freeze() -> None:
    quorum = Quorum("canary", ("ann",), 1, 10_000.0, 100.0, "rollback")
    state = run(in_shadow_of(995.0, quorum), Looked(996.0 + 10.0, 5, Verdict.PASS, ""))
    assert state.frozen == 5000.0, "people are asked after it"
    state = run(state, Looked(5000.0, 6, Verdict.PASS, ""))
    assert state.question == Question(6, 5000.0, 1, "", False)
    state = run(state, Answered(5001.0, 7, "ann", "approve", "d", ""), Looked(5002.0, 8, Verdict.PASS, ""))
    assert state.phase is Phase.CANARY


def in_shadow_of(when: float, quorum: Quorum) -> Rollout:
    state = deployed(when, approvals=quorum)
    return run(state, Done(when, 4, state.pending[0].id))


def asked_then_frozen(quorum: Quorum) -> Rollout:
    """People were asked at 906; then a freeze came over it, from 1000 to 5000, and found it passing."""
    state = run(in_shadow_of(895.0, quorum), Looked(906.0, 5, Verdict.PASS, ""), Looked(1100.0, 6, Verdict.PASS, ""))
    assert state.question is not None
    assert state.frozen == 5000.0
    return state


def test_people_who_were_asked_have_their_time_after_the_freeze() -> None:
    state = asked_then_frozen(Quorum("canary", ("ann",), 1, 10_000.0, 50_000.0, "pause"))
    late = run(state, Looked(5050.0, 7, Verdict.HOLD, ""), Looked(5101.0, 8, Verdict.HOLD, ""))
    assert (late.phase, due(late)) == (Phase.SHADOW, 55_000.0), "it waits for people, not for evidence"
    assert "frozen" not in late.label
    agreed = run(state, Answered(4000.0, 7, "ann", "approve", "d", ""))
    assert run(agreed, Looked(5000.0, 8, Verdict.PASS, "")).phase is Phase.CANARY


def test_a_freeze_longer_than_the_time_to_answer_refuses_no_answer() -> None:
    state = asked_then_frozen(Quorum("canary", ("ann",), 1, 10_000.0, 100.0, "rollback"))
    assert run(state, Answered(4900.0, 7, "ann", "approve", "d", "")).question is not None
    assert due(state) == 5100.0
    assert run(state, Ticked(5100.0, 7)).reason == "0 of 1 approvals in 100 s"


def test_who_resumes_in_a_freeze_shortens_nobody_s_time() -> None:
    state = asked_then_frozen(Quorum("canary", ("ann",), 1, 10_000.0, 100.0, "rollback"))
    state = run(state, Ordered(2000.0, 7, "pause", ""), Ordered(2100.0, 8, "resume", ""))
    assert due(state) == 5100.0


def test_the_ledger_keeps_it() -> None:
    event = Requested(2000.0, 1, "m", "2", "d", "1", frozen_terms())
    assert from_body(*to_body(event), 2000.0, 1) == event
    assert rollout.fold([event]) is not None
