"""Whose word an answer is, however the name is written, and whether it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.approval import Question, granted, objection, person, standing, with_approval
from policies.events import Answered, Quorum, from_body, to_body

ASKED = Question(7, 100.0, 3, "evidence", ordered=False)
TWO = Quorum("promote", ("alice", "José", "carl"), 2, 50.0, 50.0, "rollback")
ALICE = ("alice", "Alice", "ALICE", " alice", "alice\u00a0", "\uff41lice")
JOSE = ("José", "josé", "jose\u0301", "JOSE\u0301 ")


def approved(by: str, at: float = 110.0) -> Answered:
    return Answered(at, 8, by, "approve", "digest", "evidence")


def before_the_rule(answer: Answered) -> Answered:
    """The answer, read from an entry that was written before people were compared."""
    kind, body = to_body(answer)
    del body["by_person"]
    read = from_body(kind, body, answer.at, answer.number)
    assert isinstance(read, Answered)
    return read


def against(answer: Answered, *askers: str) -> str | None:
    return objection(TWO, ASKED, answer, "digest", askers, paused=False)


@pytest.mark.parametrize(
    "spellings", [ALICE, JOSE, ("Straße", "STRASSE"), ("Μαΐου", "Μαΐου".upper()), ("ᾷ", "ᾷ".title(), "ᾷ".upper())]
)
def test_a_person_is_the_same_however_the_name_is_written(spellings: tuple[str, ...]) -> None:
    assert len({person(each) for each in spellings}) == 1
    assert person(person(spellings[0])) == person(spellings[0])


def test_who_is_not_the_same_stays_apart() -> None:
    assert len({person(each) for each in ("alice", "alicia", "al ice", "jose", "josé", "Straße", "Strasze")}) == 7


@pytest.mark.parametrize("by", [*ALICE, *JOSE])
@pytest.mark.parametrize("what", ["approve", "refuse"])
def test_whom_the_policy_names_may_answer_however_the_name_is_written(by: str, what: str) -> None:
    assert against(replace(approved(by), answer=what), "ben") is None
    assert against(replace(approved(f"{by}x"), answer=what)) is not None


@pytest.mark.parametrize("asker", ALICE)
@pytest.mark.parametrize("by", ALICE)
def test_who_asked_does_not_approve_however_the_name_is_written(asker: str, by: str) -> None:
    told = against(approved(by), "ben", asker)
    assert told is not None
    assert f"'{by}' asked for this rollout" in told
    assert (f"(as '{asker}')" in told) == (asker != by)
    assert against(replace(approved(by), answer="refuse"), asker) is None


def test_who_answers_again_in_another_spelling_counts_once_and_renews_the_approval() -> None:
    question = ASKED
    for at, by in ((110.0, "alice"), (120.0, "ALICE"), (140.0, " Alice")):
        question = replace(question, given=with_approval(question, approved(by, at)))
        assert standing(TWO, question, at) == {by}, "as the person wrote it"
        assert not granted(TWO, question, at)
    assert standing(TWO, question, 189.0)
    question = replace(question, given=with_approval(question, approved("JOSÉ", 141.0)))
    assert granted(TWO, question, 141.0)


def test_an_answer_from_before_the_rule_counts_as_it_did() -> None:
    """What came of it was done, and stands in the entries after it: a record that folds otherwise cannot be read."""
    first, second = before_the_rule(approved("alice")), before_the_rule(approved("Alice"))
    assert against(second, "alice") is None
    question = replace(ASKED, given=with_approval(ASKED, first))
    question = replace(question, given=with_approval(question, second))
    assert granted(TWO, question, 110.0)
    question = replace(question, given=with_approval(question, approved("ALICE")))
    assert standing(TWO, question, 110.0) == {"ALICE"}, "whoever answers today is one person"


def test_an_answer_that_is_written_is_read_as_it_was() -> None:
    kind, body = to_body(approved("Alice"))
    assert body["by"] == "Alice"
    assert from_body(kind, body, 110.0, 8) == approved("Alice")
