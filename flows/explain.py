"""Why each decision of a rollout fell, from the ledger alone: statistic, interval, n, threshold, and what would have
changed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flows.story import PAUSED, evidence_of, label_of, policy_of, reports_in, story_of
from policies import gates
from policies.events import from_body
from policies.nearest import nearest, of_check
from policies.rollout import OUTCOMES, Rollout, step
from tasks.ports import Entry, Ledger, NotThere


def explained(ledger: Ledger, name: str) -> dict[str, Any]:
    """The decisions of the rollout of that name, or of the newest rollout of the model of that name; JSON-able.

    A decision is a look, a check or an order that moved, paused or resumed the rollout, or a person's answer; of one
    under way also the newest look. Raises NotThere if the ledger knows neither; PortError if it cannot be read.
    """
    entries = ledger.read(name)
    if not entries:
        newest = next(iter(ledger.rollouts(name)), None)
        if newest is None:
            raise NotThere(f"the ledger has no rollout '{name}', and none of a model of that name")
        entries = ledger.read(newest)
    state, decisions = _walk(entries)
    pages = [asdict(page) for page in story_of(entries).pages]
    return {
        "rollout": entries[0].rollout,
        "model": state.model,
        "version": state.candidate,
        "baseline": state.stable,
        "outcome": OUTCOMES.get(state.phase, str(state.phase)),
        "paused": state.paused_at is not None,
        "reason": state.reason,
        "decisions": decisions,
        "pages": pages,
    }


def _walk(entries: Sequence[Entry]) -> tuple[Rollout, list[dict[str, Any]]]:
    policy, decisions = policy_of(entries), []
    known = gates.begin(policy)
    state: Rollout | None = None
    looked: dict[str, Any] | None = None
    for entry in entries:
        before = state
        state, _ = step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
        evidence = evidence_of(entry)
        told = before is not None and (_label(before) != _label(state) or before.moved_by != state.moved_by)
        moved = told or entry.kind == "answered"
        reports = [asdict(report) for report in reports_in(entry.body)]
        decision = {
            "number": entry.number, "at": entry.at, "by": entry.actor, "kind": entry.kind, "from": _label(before),
            "to": _label(state), "says": _says(entry, before, state), "reports": reports,
        }  # fmt: skip
        looked = None
        if entry.kind == "checked":
            for report, body in zip(reports_in(entry.body), reports, strict=True):
                body["nearest"] = of_check(report)
        if evidence is not None:
            was, at_stage = known, int(entry.body["stage"])
            known, _ = gates.look(policy, at_stage, was, evidence)
            looked = decision
            if moved or entry is entries[-1] or _is_last_look(entries, entry):
                for report, body in zip(reports_in(entry.body), reports, strict=True):
                    body["nearest"] = nearest(policy, at_stage, was, evidence, report)
        if moved or (looked is not None and not state.ended and _is_last_look(entries, entry)):
            decisions.append(decision)
    assert state is not None
    return state, decisions


def _is_last_look(entries: Sequence[Entry], entry: Entry) -> bool:
    last = next((each for each in reversed(entries) if each.body.get("evidence") is not None), None)
    return last is entry


def _label(state: Rollout | None) -> str:
    return label_of(state) if state is not None else ""


def _says(entry: Entry, before: Rollout | None, state: Rollout) -> str:
    if entry.kind != "ordered" and _pauses(_label(before), _label(state)):
        return state.reason  # it paused by itself: no word of the entry's own says so
    told = next((str(entry.body[key]) for key in ("says", "error", "reason") if entry.body.get(key)), "")
    if entry.kind == "answered":
        told = ": ".join(filter(None, (str(entry.body["answer"]), told)))
        return f"{told} ({entry.body['ticket']})" if entry.body.get("ticket") else told
    return told or (state.reason if state.ended else "")


def _pauses(before: str, after: str) -> bool:
    return after.endswith(PAUSED) and not before.endswith(PAUSED)


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text, a block per decision."""
    outcome = f"{found['outcome']}{PAUSED if found['paused'] else ''}"
    told = [f"{found['rollout']}: {found['model']} v{found['version']}, {outcome}: {found['reason'] or '-'}"]
    start = found["decisions"][0]["at"] if found["decisions"] else 0.0
    for each in found["decisions"]:
        told.append(f"\n+{each['at'] - start:.0f} s  {each['from']} -> {each['to']}  ({each['kind']}, by {each['by']})")
        if each["says"] and (not each["reports"] or _pauses(each["from"], each["to"])):
            told.append(f"  {each['says']}")
        for report in each["reports"]:
            told.append(f"  {report['verdict']:<5} {report['gate']}: {report['says']}")
            numbers = _numbers(report)
            if numbers:
                told.append(f"        {numbers}")
            if report.get("nearest"):
                told.append(f"        would have changed it: {report['nearest']}")
    if found["pages"]:
        told.append("")
    for page in found["pages"]:
        told.append(f"Evidently on {page['what']}: " + (page["link"] or f"no page: {page['error']}"))
    return told


def _numbers(report: dict[str, Any]) -> str:
    parts = [f"{name} {report[name]:.4g}" for name in ("statistic", "estimate") if report[name] is not None]
    if report["low"] is not None and report["high"] is not None:
        parts.append(f"interval {report['low']:.4g} to {report['high']:.4g}")
    if report["n"]:
        parts.append(f"n {report['n']:,}")
    if report["threshold"] is not None:
        parts.append(f"threshold {report['threshold']:.4g}")
    return ", ".join(parts) + (f" ({report['unit']})" if parts and report["unit"] else "")
