"""`lockgate explain`: the ledger alone says why each decision fell, and what would have changed it."""

from __future__ import annotations

import json

import pytest

from flows.explain import explained, lines
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


def test_a_name_that_the_ledger_does_not_know_is_told() -> None:
    with pytest.raises(NotThere, match="no rollout 'nobody'"):
        explained(World().ledger, "nobody")
