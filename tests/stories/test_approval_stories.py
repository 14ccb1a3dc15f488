"""People are asked before a version goes on: what they are shown, whose word counts; the way back never waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from flows.approval import answer, asked, lines
from flows.page import Shown, page
from flows.record import replay
from flows.rollback import take_back
from flows.story import fold
from policies.events import Answered, Phase, to_body
from policies.policy import Policy, PolicyError
from policies.policy_yaml import parse
from policies.rollout import Illegal, Rollout
from policies.verdict import GateReport, Verdict
from tasks.ports import NotThere, PortError
from tests.stories.world import MODEL, POLICY, World, directly

BEFORE_PROMOTION = POLICY + "governance: {approvals: {by: [ann, ben], count: 2, wait: 60s}}\n"
TWO_SPELLINGS = BEFORE_PROMOTION.replace("ann, ben", "ann, Ann")
BEFORE_CANARY = POLICY + "governance: {approvals: {before: canary, by: [ann], wait: 60s}}\n"


def drive(world: World, *acts: tuple[float, Callable[[], Any]], by: str = "") -> Rollout:
    """Drives the rollout; each act is done once, as many seconds after the question was asked first."""
    controller = world.controller(world.request(by=by))
    began: list[float] = []
    left = list(acts)

    def alarm() -> None:
        state = fold(world.ledger.read("r1"))
        if not began and state is not None and state.question is not None:
            began.append(world.clock.now())
        while began and left and world.clock.now() >= began[0] + left[0][0]:
            left.pop(0)[1]()

    world.clock.alarms.append(alarm)
    state = controller.drive()
    assert not left, "what was to happen has not happened"
    return state


def say(
    world: World, who: str, what: str = "approve", why: str = "seen by the desk", **other: str
) -> Callable[[], Rollout]:
    def said() -> Rollout:
        question = {**asked(world.ledger, MODEL, world.clock.now()), **other}
        return answer(world.ledger, world.clock, question, who, what, why, "CHG-42", via="test")

    return said


def test_two_people_approve_and_the_next_passing_look_promotes() -> None:
    world = World(BEFORE_PROMOTION)
    state = drive(world, (5, say(world, "ann")), (30, say(world, "ben")))
    assert state.phase is Phase.PROMOTED
    answers = [entry for entry in world.ledger.entries if entry.kind == "answered"]
    assert [(e.body["by"], e.body["ticket"], e.actor) for e in answers] == [
        ("ann", "CHG-42", "ann (test)"),
        ("ben", "CHG-42", "ben (test)"),
    ]
    promoted = next(e for e in world.ledger.entries if e.number > answers[1].number)
    assert (promoted.kind, promoted.body["verdict"]) == ("looked", "pass")
    looks = [e for e in world.ledger.entries if e.kind == "looked" and answers[0].number < e.number < answers[1].number]
    assert len(looks) > 20, "it stays watched while it waits"


def test_one_person_does_not_approve_for_two_however_the_name_is_written() -> None:
    world = World(BEFORE_PROMOTION)
    state = drive(world, (5, say(world, "ann")), (6, say(world, "Ann")), (7, say(world, " ANN")))
    assert (state.phase, state.reason) == (Phase.ROLLED_BACK, "1 of 2 approvals in 60 s")
    written = [(e.body["by"], e.actor) for e in world.ledger.entries if e.kind == "answered"]
    assert written == [("ann", "ann (test)"), ("Ann", "Ann (test)"), (" ANN", " ANN (test)")], "as the person wrote it"


@pytest.mark.parametrize(("asker", "who"), [("Ann", "ann"), ("ann", "ANN"), ("ann ", "ann")])
def test_who_asked_does_not_approve_it_under_another_spelling(asker: str, who: str) -> None:
    world = World(BEFORE_PROMOTION)

    def tried() -> None:
        with pytest.raises(Illegal, match=f"'{who}' asked for this rollout .as '{asker}'., and somebody else"):
            say(world, who)()

    assert drive(world, (5, tried), (6, say(world, "ben")), by=asker).reason == "1 of 2 approvals in 60 s"


def recorded() -> World:
    """Under way by a policy from before two spellings of one name were refused."""
    with pytest.raises(PolicyError, match="'ann' and 'Ann' are one person"):
        parse(TWO_SPELLINGS)
    world = World(first=True)
    world.target.store.add("digest-1")
    assert world.controller(world.request("r0", "1")).drive().phase is Phase.PROMOTED
    world.stable, world.policy = "1", Policy.model_validate(yaml.safe_load(TWO_SPELLINGS))
    return world


def test_under_a_recorded_policy_with_two_spellings_one_person_is_still_one() -> None:
    world = recorded()
    state = drive(world, (5, say(world, "ann")), (6, say(world, "Ann")))
    assert (state.phase, state.reason) == (Phase.ROLLED_BACK, "1 of 2 approvals in 60 s")


def test_a_record_of_one_person_who_approved_for_two_is_read_replayed_and_gone_back_from() -> None:
    """What was decided stays decided: it went live then, and can be taken back now."""
    world = recorded()

    def as_then(who: str) -> Callable[[], None]:
        def said() -> None:
            seen, entries = asked(world.ledger, MODEL, world.clock.now()), world.ledger.read("r1")
            event = Answered(world.clock.now(), 0, who, "approve", seen["digest"], seen["evidence_hash"])
            kind, body = to_body(event)
            body.pop("by_person", None)
            world.ledger.append("r1", entries[-1].sequence + 1, event.at, f"{who} (test)", kind, body)

        return said

    assert drive(world, (5, as_then("ann")), (6, as_then("Ann")), by="ANN").phase is Phase.PROMOTED
    looks, differences = replay(world.ledger.read("r1"))
    assert looks > 20
    assert differences == []
    world.stable, world.policy = "2", parse(POLICY)
    world.target.store.add("digest-3")
    assert world.controller(world.request("r2", "3")).drive().phase is Phase.PROMOTED
    _, state = take_back(world.ports, MODEL, "complaints", "ben", world.seen.append, directly)
    assert (state.phase, state.candidate) == (Phase.PROMOTED, "2"), "the version of the recorded policy"
    assert world.router.current(MODEL).stable == "2"  # type: ignore[union-attr]


def test_what_is_shown_is_the_evidence_that_it_was_asked_on() -> None:
    world = World(BEFORE_PROMOTION)
    seen: list[dict[str, Any]] = []
    drive(
        world, (5, lambda: seen.append(asked(world.ledger, MODEL, world.clock.now()))), (6, say(world, "ann", "refuse"))
    )
    (question,) = seen
    assert (question["to"], question["by"], question["count"]) == ("promotion", ["ann", "ben"], 2)
    assert question["counts"]["candidate"]["requests"] > 0
    assert [report["gate"] for report in question["reports"]] == ["errors", "traffic"]
    text = "\n".join(lines(question))
    assert question["evidence_hash"] in text
    assert question["digest"] in text


def test_what_is_shown_is_what_was_kept_where_a_check_s_words_could_not_be() -> None:
    world = World(BEFORE_CANARY.replace("    - shadow: {share: 1.0, for: 8s}\n", ""))
    world.checks = [GateReport("data", Verdict.PASS, "column caf\udce9")]
    assert drive(world, (5, say(world, "ann"))).phase is Phase.PROMOTED


def test_an_approval_that_has_expired_is_not_shown_as_given() -> None:
    world = World(BEFORE_PROMOTION.replace("wait: 60s", "wait: 60s, expires: 10s"))
    given: list[list[str]] = []

    def look() -> None:
        question = asked(world.ledger, MODEL, world.clock.now())
        state = fold(world.ledger.read("r1"))
        assert state is not None
        shown = page(Shown("r1", state, "local", world.clock.now()))
        assert ("given by ann" in shown) == bool(question["given"])
        given.append(question["given"])

    drive(world, (5, say(world, "ann")), (6, look), (20, look), (21, say(world, "ann", "refuse")))
    assert given == [["ann"], []]


def test_a_version_that_turns_bad_while_people_are_asked_goes_back_at_once() -> None:
    world = World(BEFORE_PROMOTION)
    state = drive(world, (20, lambda: world.given("2", errors=0.5)))
    assert state.phase is Phase.ROLLED_BACK
    assert "errors" in state.reason
    assert not any(entry.kind == "answered" for entry in world.ledger.entries)


def test_a_refusal_takes_it_back_and_says_who_and_why() -> None:
    world = World(BEFORE_PROMOTION)
    state = drive(world, (5, say(world, "ann", "refuse", evidence_hash="of something else")))
    assert state.phase is Phase.ROLLED_BACK
    assert state.reason == "refused by ann: seen by the desk"
    assert world.ledger.quarantined("digest-2") is None


def test_a_refusal_counts_whatever_characters_it_is_written_in() -> None:
    world = World(BEFORE_PROMOTION)
    state = drive(world, (5, say(world, "ann", "refuse", "not in the caf\udce9")))
    assert (state.phase, state.reason) == (Phase.ROLLED_BACK, "refused by ann: not in the caf\ufffd")


def test_nobody_answers_and_it_goes_back_when_the_time_is_over() -> None:
    state = drive(World(BEFORE_PROMOTION))
    assert state.phase is Phase.ROLLED_BACK
    assert state.reason == "0 of 2 approvals in 60 s"


def test_before_any_live_traffic_the_shadow_goes_on_and_no_request_is_answered() -> None:
    world = World(BEFORE_CANARY)
    seen: list[Any] = []
    state = drive(world, (25, lambda: seen.append(world.router.current(MODEL))), (30, say(world, "ann")))
    assert state.phase is Phase.PROMOTED
    assert (seen[0].weight, seen[0].shadow) == (0, 100)


def test_a_first_version_waits_without_traffic() -> None:
    world = World(BEFORE_PROMOTION, first=True)
    seen: list[Any] = []
    acts = (5, lambda: seen.append(world.router.current(MODEL))), (6, say(world, "ann")), (7, say(world, "ben"))
    assert drive(world, *acts).phase is Phase.PROMOTED
    assert seen == [None]


@pytest.mark.parametrize(
    ("who", "other", "why"),
    [
        ("mallory", {}, "does not name 'mallory'"),
        ("ann", {"digest": "ffff"}, "other bytes"),
        ("ann", {"evidence_hash": "ffff"}, "other evidence"),
    ],
)
def test_an_approval_that_does_not_count_is_refused_in_a_sentence(who: str, other: dict[str, str], why: str) -> None:
    world = World(BEFORE_PROMOTION)

    def tried() -> None:
        with pytest.raises(Illegal, match=why):
            say(world, who, **other)()

    drive(world, (5, tried), (6, say(world, "ben", "refuse")))


def test_evidence_that_was_changed_in_the_ledger_cannot_be_approved() -> None:
    world = World(BEFORE_PROMOTION)

    def tampered() -> None:
        hashed = fold(world.ledger.read("r1")).question.evidence_hash  # type: ignore[union-attr]
        looked = next(e for e in world.ledger.read("r1") if e.body.get("evidence_hash") == hashed)
        kept = looked.body["reports"][0]["says"]
        looked.body["reports"][0]["says"] = "all is well"
        with pytest.raises(PortError, match="does not hold the evidence"):
            say(world, "ann")()
        looked.body["reports"][0]["says"] = kept

    drive(world, (5, tampered), (6, say(world, "ann", "refuse")))


def test_without_a_question_there_is_nothing_to_approve() -> None:
    with pytest.raises(NotThere, match="waits for approval"):
        asked(World().ledger, MODEL, 0.0)


def test_going_back_by_hand_asks_nobody() -> None:
    """Invariant 9: v1 comes back, although its own policy asks for two people before a promotion."""
    world = World(BEFORE_PROMOTION, first=True)
    world.target.store.add("digest-1")
    world.controller(world.request("r0", "1"))
    drive_first(world, "r0", say(world, "ann"), say(world, "ben"))
    world.stable = "1"
    assert drive(world, (1, say(world, "ann")), (2, say(world, "ben"))).phase is Phase.PROMOTED
    _, state = take_back(world.ports, MODEL, "complaints", "ben", world.seen.append, directly)
    assert (state.phase, state.candidate) == (Phase.PROMOTED, "1")
    assert world.router.current(MODEL).stable == "1"  # type: ignore[union-attr]


def drive_first(world: World, name: str, *acts: Callable[[], Any]) -> None:
    left = list(acts)

    def alarm() -> None:
        state = fold(world.ledger.read(name))
        if left and state is not None and state.question is not None:
            left.pop(0)()

    world.clock.alarms.append(alarm)
    assert world.controller(name).drive().phase is Phase.PROMOTED
    world.clock.alarms.remove(alarm)
