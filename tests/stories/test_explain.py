"""`lockgate explain`: the ledger alone says why each decision fell, and what would have changed it."""

from __future__ import annotations

import json

import pytest

from flows.approval import answer, asked
from flows.explain import explained, lines
from flows.orders import order
from flows.story import fold
from tasks.ports import NotThere
from tests.stories.world import MODEL, POLICY, World


def test_every_move_by_evidence_is_explained_with_numbers_and_a_counterfactual() -> None:
    world = World()
    world.drive()
    found = explained(world.ledger, "r1")
    looks = [each for each in found["decisions"] if each["kind"] == "looked"]
    assert [each["from"] for each in looks] == ["shadow 100 %", "canary 20 %", "canary 50 %", "watching"]
    for each in looks:
        errors = next(report for report in each["reports"] if report["gate"] == "errors")
        assert errors["n"] > 0
        assert errors["low"] <= errors["estimate"] <= errors["high"]
        assert errors["threshold"] > 0
        assert errors["nearest"]
    assert json.loads(json.dumps(found)) == found


def test_a_failure_says_how_many_errors_would_have_been_none() -> None:
    world = World().given("2", errors=0.10)
    world.drive()
    last = [each for each in explained(world.ledger, MODEL)["decisions"] if each["kind"] == "looked"][-1]
    errors = next(report for report in last["reports"] if report["gate"] == "errors")
    assert errors["verdict"] == "fail"
    assert "errors of the candidate at this look instead of" in errors["nearest"]
    assert errors["nearest"].endswith("hold")
    assert any("would have changed it" in line for line in lines(explained(world.ledger, "r1")))


def test_labels_that_lag_hold_the_last_stage_and_the_record_says_what_is_missing() -> None:
    policy = POLICY.replace("errors: {margin: 0.02}", "errors: {margin: 0.02}\n    quality: {margin: 0.05}")
    world = World(policy)
    world.telemetry.labelled = 0.01
    state = world.drive()
    assert state.candidate == "2"
    assert world.registry.aliases == {"champion": "1"}, "without the labels nothing is promoted"
    looks = [each for each in explained(world.ledger, "r1")["decisions"] if each["kind"] == "looked"]
    quality = next(report for report in looks[-1]["reports"] if report["gate"] == "quality")
    assert quality["verdict"] == "hold"
    assert "lack their label" in quality["needs"]


def test_with_labels_a_good_version_is_promoted_and_a_worse_one_taken_back() -> None:
    policy = POLICY.replace("errors: {margin: 0.02}", "errors: {margin: 0.02}\n    quality: {margin: 0.05}")
    good, bad = World(policy), World(policy).given("2", wrong=0.3)
    good.drive()
    bad.drive()
    assert good.registry.aliases["champion"] == "2"
    assert bad.registry.aliases["champion"] == "1"
    assert "quality" in str(explained(bad.ledger, "r1")["reason"])


def test_who_paused_and_resumed_it_and_why_is_told_and_the_first_line_says_that_it_is_paused() -> None:
    world = World()
    told: list[str] = []

    def pause() -> None:
        state = fold(world.ledger.read("r1"))
        if state is None or state.label != "canary 20 %" or state.pending:
            return
        if state.paused_at is None and not told:
            order(world.ports, "r1", "ann/1", "pause", "the desk calls", "ann")
            told.extend(lines(explained(world.ledger, "r1")))
            order(world.ports, "r1", "ben/2", "resume", "it was another model", "ben")

    world.clock.alarms.append(pause)
    world.drive()
    assert told[0] == "r1: m v2, canary (paused): pause ordered: the desk calls"
    text = "\n".join(lines(explained(world.ledger, "r1")))
    assert "canary 20 % -> canary 20 % (paused)  (ordered, by ann/1)\n  the desk calls\n" in text
    assert "canary 20 % (paused) -> canary 20 %  (ordered, by ben/2)\n  it was another model\n" in text
    assert text.startswith("r1: m v2, promoted: ")


def test_a_rollout_that_pauses_by_itself_says_why() -> None:
    policy = POLICY.replace("errors: {margin: 0.02}", "errors: {margin: 0.02}\n    quality: {margin: 0.05}")
    world = World(policy.replace("patience: 60s", "patience: 60s\n  on_exhausted: pause"))
    world.telemetry.labelled = 0.01

    def resume() -> None:
        state = fold(world.ledger.read("r1"))
        if state is not None and state.paused_at is not None:
            world.telemetry.labelled = 1.0
            order(world.ports, "r1", "ann/1", "resume", "the labels are here", "ann")

    world.clock.alarms.append(resume)
    world.drive()
    found = explained(world.ledger, "r1")
    (paused,) = [each for each in found["decisions"] if each["to"].endswith(" (paused)")]
    assert "not enough evidence in" in paused["says"]
    assert f"  {paused['says']}" in lines(found)


def test_an_approval_is_told_with_who_gave_it_why_and_the_ticket() -> None:
    world = World(POLICY + "governance: {approvals: {by: [ann, ben], count: 2, wait: 60s}}\n")
    left = ["ann", "ben"]

    def approve() -> None:
        state = fold(world.ledger.read("r1"))
        if left and state is not None and state.question is not None:
            who = left.pop(0)
            question = asked(world.ledger, MODEL, world.clock.now())
            answer(world.ledger, world.clock, question, who, "approve", f"{who} has seen it", f"CHG-{who}", "form")

    world.clock.alarms.append(approve)
    world.drive()
    text = "\n".join(lines(explained(world.ledger, "r1")))
    for who in ("ann", "ben"):
        assert f"  (answered, by {who} (form))\n  approve: {who} has seen it (CHG-{who})\n" in text


def test_a_name_that_the_ledger_does_not_know_is_told() -> None:
    with pytest.raises(NotThere, match="no rollout 'nobody'"):
        explained(World().ledger, "nobody")
