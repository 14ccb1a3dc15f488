"""What people are asked before a candidate goes on, and which of their answers count. A refusal always does.

An approval is of these bytes and of the evidence that was shown, by somebody whom the policy names and who did not
ask for the delivery (nor order the promotion); it expires. None of this is ever asked on the way back.

A person stays the same however the name is written (`person`).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policies import audit
from policies.events import Answered, Quorum, Terms


@dataclass(frozen=True)
class Question:
    """People are asked whether the candidate may go on to stage `to` (the number of stages: promotion).

    `number` is the entry that asked, `at` when it did; `ordered`: a person ordered the promotion, so that it does not
    wait for the gates. `given`: who has approved, and when.
    """

    number: int
    at: float
    to: int
    evidence_hash: str
    ordered: bool
    given: tuple[tuple[str, float], ...] = ()


def person(name: str) -> str:
    """What people's names are compared by: capitals, spaces around it and composed letters tell nobody apart.

    Compatibility caseless matching (The Unicode Standard, 3.13, D146).
    """
    name = unicodedata.normalize("NFD", name)
    for _ in range(2):
        name = unicodedata.normalize("NFKC", name.casefold())
    return name.strip()


def shown_hash(shown: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of what is shown to those who approve: a ledger entry's reports, evidence and stage."""
    body = {name: shown[name] for name in ("evidence", "reports", "stage") if name in shown}
    return hashlib.sha256(audit.canonical(audit.written(body)[1]).encode()).hexdigest()


def needed(terms: Terms, to: int) -> bool:
    """Whether people must agree before stage `to`: before the first live request, or before the promotion."""
    if terms.approvals is None:
        return False
    promotion = to >= len(terms.stops)
    return promotion or (terms.approvals.before == "canary" and terms.stops[to].weight > 0)


def standing(quorum: Quorum, question: Question, at: float) -> set[str]:
    """Who has approved, where the approval has not expired."""
    return {who for who, when in question.given if at < when + quorum.expires_s}


def granted(quorum: Quorum, question: Question, at: float) -> bool:
    """Whether enough people have approved."""
    return len(standing(quorum, question, at)) >= quorum.count


def with_approval(question: Question, answer: Answered) -> tuple[tuple[str, float], ...]:
    """Who has approved, with one more; a second approval of the same person renews the first."""
    return (*((who, when) for who, when in question.given if not _is_of(answer, who)), (answer.by, answer.at))


def _is_of(answer: Answered, name: str) -> bool:
    """Whether the person of that name gave the answer."""
    return person(answer.by) == person(name) if answer.by_person else answer.by == name


def objection(
    quorum: Quorum | None,
    question: Question | None,
    answer: Answered,
    digest: str,
    askers: tuple[str, ...],
    paused: bool,
) -> str | None:
    """Why the answer cannot be taken, as a sentence; None if it can. A refusal needs nothing but a name on the list."""
    if quorum is None or question is None:
        return "nobody is asked for approval now"
    if person(answer.by) not in map(person, quorum.by):
        return f"the policy does not name '{answer.by}' among those who approve: {', '.join(quorum.by)}"
    if answer.answer == "refuse":
        return None
    if answer.answer != "approve":
        return f"'{answer.answer}' is no answer; say approve or refuse"
    asker = next((name for name in askers if _is_of(answer, name)), None)
    if asker is not None:
        told = "" if asker == answer.by else f" (as '{asker}')"
        return f"'{answer.by}' asked for this rollout{told}, and somebody else has to approve it"
    if answer.digest != digest:
        return f"the approval is of other bytes ({answer.digest[:12]}, not {digest[:12]})"
    if answer.evidence_hash != question.evidence_hash:
        return f"the approval is of other evidence ({answer.evidence_hash[:12]}, not {question.evidence_hash[:12]})"
    if paused:
        return "the rollout is paused; resume it first"
    if answer.at >= question.at + quorum.wait_s:
        return "the time to approve is over"
    return None
