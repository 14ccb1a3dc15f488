"""The record recomputes to the same decisions, and says where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from flows.record import exported, replay, verified
from policies import audit
from policies.audit import Head
from policies.verdict import Verdict, worst
from tasks.ports import BadInput
from tests.stories.world import POLICY, World

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def world() -> World:
    """A rollout that was taken back by its gates."""
    made = World().given("2", errors=0.10)
    made.drive()
    return made


def test_every_decision_comes_out_the_same_from_the_record_alone(world: World) -> None:
    looks, differences = replay(world.ledger.read("r1"))
    assert looks > 3
    assert differences == []


def test_a_record_from_before_stages_without_a_gate_were_reported_recomputes_to_what_was_decided() -> None:
    made = World(POLICY.replace("errors: {margin: 0.02}", "errors: null\n    disagreement: {margin: 0.05}"))
    made.drive()
    entries = made.ledger.read("r1")
    looks = [i for i, entry in enumerate(entries) if entry.kind == "looked"]
    assert any(report["gate"] == "gates" for i in looks for report in entries[i].body["reports"])
    for i in looks:
        before = [report for report in entries[i].body["reports"] if report["gate"] != "gates"]
        verdict = str(worst(Verdict(report["verdict"]) for report in before))
        entries[i] = replace(entries[i], body={**entries[i].body, "reports": before, "verdict": verdict})
    assert any(entries[i].body["verdict"] == "pass" for i in looks)
    assert replay(entries) == (len(looks), [])


def test_a_verdict_that_the_evidence_does_not_bear_is_found(world: World) -> None:
    entries = world.ledger.read("r1")
    at = next(i for i, entry in enumerate(entries) if entry.body.get("verdict") == "fail")
    entries[at] = replace(entries[at], body={**entries[at].body, "verdict": "pass"})
    _, differences = replay(entries)
    assert [each.number for each in differences] == [entries[at].number]


def test_evidence_that_was_changed_changes_the_decisions(world: World) -> None:
    entries = world.ledger.read("r1")
    at = next(i for i, entry in enumerate(entries) if entry.body.get("verdict") == "fail")
    evidence = entries[at].body["evidence"]
    tamed = {**evidence, "candidate": {**evidence["candidate"], "errors": 0}}
    entries[at] = replace(entries[at], body={**entries[at].body, "evidence": tamed})
    _, differences = replay(entries)
    assert differences


def test_an_export_is_verified_with_its_key_and_refused_with_another(world: World, tmp_path: object) -> None:
    lines = list(exported(world.ledger, KEY))
    assert audit.verify_export(lines, KEY).signed
    assert audit.verify_export(lines, KEY[::-1]).breach is not None
    assert audit.verify_export(lines[:-2] + lines[-1:], KEY).breach is not None


def test_the_ledger_is_held_against_its_own_head(world: World) -> None:
    assert verified(world.ledger, None, None).breach is None


def test_a_ledger_that_is_written_to_while_it_is_verified_is_sound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, lines = world.ledger.head(), world.ledger.lines

    def later() -> Iterator[bytes]:
        world.ledger.append("of another", 1, 0.0, "somebody", "noted", {})  # the first line is not read before
        yield from lines()

    monkeypatch.setattr(world.ledger, "lines", later)
    seen = verified(world.ledger, None, None, before)
    assert (seen.head.number, seen.breach) == (before.number + 1, None)


def test_a_ledger_that_was_cut_or_written_anew_is_found_by_a_head_that_was_noted_earlier(world: World) -> None:
    lines = list(world.ledger.lines())
    ends = [audit.verify(lines[:count]).head for count in range(1, len(lines) + 1)]
    for count, known in enumerate(ends, 1):
        assert verified(world.ledger, None, None, Head.parse(str(known))).breach is None
        if count > 1:
            cut = audit.verify(lines[: count - 1], known=[known]).breach
            assert cut is not None
            assert cut.number == count
        other = audit.verify(lines, known=[replace(known, hash="f" * 64)]).breach
        assert other is not None
        assert other.number == count


def test_a_rollout_that_is_not_there_is_bad_input() -> None:
    with pytest.raises(BadInput):
        replay([])
