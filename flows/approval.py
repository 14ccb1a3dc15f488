"""Approvals: what people are asked, shown so that they know what they say yes to, and their answers on the ledger.

All of it needs the ledger alone. Who answers is who says so: the command line's identity is as good as the machine's
log-in, and open-source Prefect knows no people at all, so that a name given in its form is as good as the access to it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flows.orders import write
from flows.page import moment, text
from flows.story import evidence_of, fold, reports_in, weights
from policies import audit
from policies.approval import Question, shown_hash, standing
from policies.events import Answered
from policies.evidence import Counts
from policies.rollout import Rollout, due
from tasks.ports import Clock, Entry, Ledger, NotThere, PortError


def asked(ledger: Ledger, model: str, at: float) -> dict[str, Any]:
    """What people are asked now about the model's rollout under way; JSON-able. Raises NotThere if nobody is asked."""
    for name in ledger.rollouts(model, active=True):
        entries = ledger.read(name)
        state = fold(entries)
        if state is not None and state.question is not None:
            return shown(entries, state, state.question, at)
    raise NotThere(f"no rollout of '{model}' waits for approval")


def stands(ledger: Ledger, rollout: str, number: int, at: float) -> dict[str, Any] | None:
    """The question that the entry asked, as long as it is asked. Raises PortError."""
    entries = ledger.read(rollout)
    state = fold(entries)
    if state is None or state.question is None or state.question.number != number:
        return None
    return shown(entries, state, state.question, at)


def shown(entries: list[Entry], state: Rollout, question: Question, at: float) -> dict[str, Any]:
    """The question, with the evidence that it is asked on. Raises PortError if the ledger's evidence is not that."""
    quorum = state.terms.approvals
    assert quorum is not None
    said = [entry for entry in reversed(entries) if "reports" in entry.body]
    looked = next((entry for entry in said if entry.body.get("evidence_hash") == question.evidence_hash), None)
    if looked is None or shown_hash(looked.body) != question.evidence_hash:
        raise PortError(f"the ledger does not hold the evidence {question.evidence_hash[:12]} of {entries[0].rollout}")
    evidence, ends, stand = evidence_of(looked), due(state), standing(quorum, question, at)
    traffic = weights(state)
    assert traffic is not None  # it has not ended
    stops = state.terms.stops
    to = "promotion" if question.to >= len(stops) else f"{stops[question.to].phase} {stops[question.to].weight} %"
    return {
        "rollout": entries[0].rollout,
        "model": state.model,
        "version": state.candidate,
        "baseline": state.stable,
        "digest": state.digest,
        "evidence_hash": question.evidence_hash,
        "question": question.number,
        "to": to,
        "now": state.label,
        "traffic": {"candidate": traffic[0], "copies": traffic[1]},
        "ordered": question.ordered,
        "why": state.reason if question.ordered else looked.body["says"],
        "seen": looked.at,
        "reports": [asdict(report) for report in reports_in(looked.body)],
        "counts": {
            name: {"requests": arm.requests, "errors": arm.errors}
            for name, arm in (("stable", evidence.stable), ("candidate", evidence.candidate))
            if isinstance(arm, Counts)
        }
        if evidence is not None
        else {},
        "by": list(quorum.by),
        "not_by": list(state.askers),
        "count": quorum.count,
        "given": [who for who, _ in question.given if who in stand],
        "until": ends,
        "otherwise": quorum.on_silence,
    }


def lines(question: dict[str, Any]) -> list[str]:
    """The question as text."""
    now = f"now: {question['now']}; v{question['baseline'] or '-'} is the baseline"
    told = [
        f"{question['model']} v{question['version']} asks for: {question['to']} ({now})",
        f"  bytes     {question['digest']}",
        f"  evidence  {question['evidence_hash']}  ({moment(question['seen'])})",
        f"  approvals {len(question['given'])} of {question['count']}, of {', '.join(question['by'])}"
        + (f"; given by {', '.join(question['given'])}" if question["given"] else ""),
    ]
    if question["not_by"]:
        told.append(f"  asked for by {', '.join(question['not_by'])}, who cannot approve it")
    if question["until"]:
        told.append(f"  until     {moment(question['until'])}; without an answer: {question['otherwise']}")
    if question["ordered"]:
        told.append(f"  it does not wait for the gates: {question['why']}")
    for name, arm in question["counts"].items():
        told.append(f"  {name:<9} {arm['requests']:,} requests, {arm['errors']:,} errors")
    told += [f"  {report['verdict']:<5} {report['gate']}: {report['says']}" for report in question["reports"]]
    return told


def page(question: dict[str, Any], objection: str = "") -> str:
    """The question as Markdown, for the form in which it is answered."""
    now = f"v{question['version']} has {question['traffic']['candidate']} % of the traffic ({text(question['now'])})"
    asks = f"**May {text(question['model'])} v{question['version']} go on to {text(question['to'])}?**"
    told = [f"{asks} Now {now}; v{question['baseline'] or '-'} is what it is compared with."]
    if objection:
        told.insert(0, f"**The last answer was not taken: {text(objection)}.**")
    if question["ordered"]:
        told.append(f"It does not wait for the gates: {text(question['why'])}.")
    seen = [f"- **{each['verdict']}** {text(each['gate'])}: {text(each['says'])}" for each in question["reports"]]
    seen += [
        f"- {name}: {arm['requests']:,} requests, {arm['errors']:,} errors" for name, arm in question["counts"].items()
    ]
    told.append("\n".join(seen))
    given = f", given by {', '.join(question['given'])}" if question["given"] else ""
    told.append(f"It needs {question['count']} of {text(', '.join(question['by']) + given)}.")
    if question["not_by"]:
        told.append(f"{text(', '.join(question['not_by']))} asked for it and cannot approve it.")
    if question["until"]:
        silence = {"rollback": "it goes back", "pause": "it pauses"}[question["otherwise"]]
        told.append(f"Until {moment(question['until'])}; without an answer {silence}. To refuse takes it back at once.")
    told.append(
        f"Bytes `{question['digest'][:12]}`, evidence `{question['evidence_hash'][:12]}` of {moment(question['seen'])};"
        f" in full: `lockgate approve {question['model']}`, which answers, too."
    )
    return "\n\n".join(told)


def answer(
    ledger: Ledger,
    clock: Clock,
    question: dict[str, Any],
    by: str,
    answered: str,
    reason: str,
    ticket: str = "",
    via: str = "",
    form: str = "",
) -> Rollout:
    """The answer to the question as it was shown, on the ledger; the rollout's state then. `form` names the form.

    Raises `rollout.Illegal`, whose message says why it cannot be taken.
    """

    def event() -> Answered:
        seen = (question["digest"], question["evidence_hash"])
        said = audit.clean(reason), audit.clean(ticket)  # to refuse is a way back: not refused for a character
        return Answered(clock.now(), 0, by, answered, *seen, *said)

    extra = {"form": form} if form else {}
    return write(ledger, question["rollout"], f"{by}{f' ({via})' if via else ''}", event, extra)
