"""A rollout as a page of Markdown and a table of its stages, for people who have never seen this one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from flows.story import evidence_of, weights
from policies.approval import standing
from policies.events import LOOKED_AT, Phase, from_body
from policies.evidence import Counts, Evidence
from policies.rollout import Rollout, due, earliest, step
from policies.verdict import GateReport, Verdict
from tasks.ports import Entry

_MEANS = {
    Verdict.PASS: "every gate has passed",
    Verdict.HOLD: "not enough evidence yet",
    Verdict.ERROR: "a gate could not look",
    Verdict.FAIL: "shown to be worse",
}


_MEANS_THEN = {
    "rollback": "it goes back",
    "pause": "it pauses for a person",
    "stop": "it is given up",
    "page": "it stops half-way, and a person is paged",
}


@dataclass(frozen=True)
class Seen:
    """What the newest look at a rollout saw, with what would have changed each gate's word."""

    at: float
    reports: tuple[GateReport, ...]
    evidence: Evidence | None = None
    nearest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What a page is made of. `links` by name."""

    rollout: str
    state: Rollout
    target: str
    at: float
    seen: Seen | None = None
    links: Mapping[str, str] = field(default_factory=dict)


def title(state: Rollout, target: str) -> str:
    """The rollout in one line: the flow run's name, too."""
    return f"{state.model} v{state.candidate} → {target}: {state.label}"


def page(shown: Shown) -> str:
    """The page."""
    state = shown.state
    blocks = [f"# {text(title(state, shown.target))}", _how_it_stands(shown), _traffic(shown)]
    if shown.seen is not None and shown.seen.reports:
        blocks.append(_gates(shown.seen))
    blocks.append(_to_do(state))
    if shown.links:
        blocks.append(" · ".join(f"[{text(name)}]({link})" for name, link in shown.links.items()))
    asked = f", asked for by {', '.join(map(text, state.askers))}" if state.askers else ""
    blocks.append(f"Rollout `{shown.rollout}`{asked}. Bytes `{state.digest[:12]}`. As of {moment(shown.at)}.")
    return "\n\n".join(blocks) + "\n"


def text(value: object) -> str:
    """The value as one line of Markdown that is only text: also within a table."""
    plain = " ".join(str(value).split())
    for sign in "\\`*_[]|<>#":
        plain = plain.replace(sign, {"<": "&lt;", ">": "&gt;"}.get(sign, f"\\{sign}"))
    return plain


def moment(at: float) -> str:
    """The time for people everywhere, to the second."""
    return datetime.fromtimestamp(at, UTC).isoformat(" ", "seconds").removesuffix("+00:00") + " UTC"


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the cells are text already."""
    told = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in told)


def _how_it_stands(shown: Shown) -> str:
    state = shown.state
    why = f": {text(state.reason)}" if state.reason else "."
    if state.phase is Phase.HALTED:
        return f"**A person is needed.** It was stopped half-way, and nothing more happens by itself{why}"
    if state.ended:
        return f"**{str(state.phase).capitalize()}**{why}"
    if state.paused_at is not None:
        return f"**Paused**{why} {_or_else(state)}"
    if state.question is not None:
        asked = state.terms.approvals
        assert asked is not None
        stand = standing(asked, state.question, shown.at)
        given = ", ".join(who for who, _ in state.question.given if who in stand)
        need = f"{asked.count} of {', '.join(asked.by)}" + (f" (given by {given})" if given else "")
        return (
            f"**People are asked.** It needs the approval of {text(need)}: resume the suspended run"
            f" *{text(state.model)} v{state.candidate}: approve …*, or say `lockgate approve {state.model}`."
            f" The gates go on looking. {_thaws(state)}{_or_else(state)}"
        )
    if state.phase is Phase.PENDING and state.frozen is not None:
        return f"**Frozen.** Nothing new is let on before {moment(state.frozen)}; then it goes on by itself."
    if state.phase not in LOOKED_AT:
        return f"**{str(state.phase).capitalize()}.** {_or_else(state)}"
    if state.pending:
        return f"**The traffic is being set.** {_or_else(state)}"
    return f"**{str(state.verdict).upper()}**: {_MEANS[state.verdict]}. {_thaws(state)}{_next(state)} {_or_else(state)}"


def _thaws(state: Rollout) -> str:
    return "" if state.frozen is None else f"A freeze lets nothing new on before {moment(state.frozen)}. "


def _next(state: Rollout) -> str:
    stops = state.terms.stops
    if state.phase is Phase.WATCHING:
        then = "it is proven, and the former version ends"
    elif state.stage + 1 < len(stops):
        after = stops[state.stage + 1]
        then = f"{after.phase} {after.weight or after.shadow} % comes next"
    else:
        then = "it is promoted"
    passed = "If that is still so" if state.verdict is Verdict.PASS else "Once every gate has passed"
    return f"{passed}, from {moment(earliest(state))} on, {then}."


def _or_else(state: Rollout) -> str:
    ends = due(state)
    if ends is None:
        return ""
    if state.question is not None and state.terms.approvals is not None:
        then, what = state.terms.approvals.on_silence, "Without an answer"
    elif state.paused_at is not None:
        then, what = "rollback", "Without anybody who resumes it"
    elif state.phase in (Phase.PROMOTING, Phase.ROLLING_BACK, Phase.PROMOTED):
        then, what = "page", "If that is not done"
    elif state.pending or state.phase is Phase.PENDING:
        then, what = "stop", "If that is not done"
    else:
        then, what = state.terms.on_exhausted, "Without enough evidence"
    return f"{what} by {moment(ends)}, {_MEANS_THEN[then]}."


def _traffic(shown: Shown) -> str:
    state = shown.state
    traffic = weights(state)
    if traffic is None:
        return "Who serves is not known from here: `lockgate status` asks."
    share, copies = traffic
    stable = f"v{state.stable} (stable)" if state.stable else "no version before it"
    evidence = shown.seen.evidence if shown.seen else None
    lines: list[list[object]] = [["live traffic", f"{100 - share} %" if state.stable else "-", f"{share} %"]]
    if copies:
        who = "copies of requests"
        lines.append([who, f"{copies} %", "-"] if share == 100 else [who, "-", f"{copies} %"])
    if evidence is not None:
        arms = (evidence.stable, evidence.candidate)
        lines.append(["requests", *(_of(arm, "requests") for arm in arms)])
        lines.append(["errors", *(_of(arm, "errors") for arm in arms)])
    return table(["", stable, f"v{state.candidate} (candidate)"], lines)


def _of(arm: Counts | Any, what: str) -> str:
    return f"{getattr(arm, what):,}" if isinstance(arm, Counts) else "-"


def _gates(seen: Seen) -> str:
    """What each gate said, the gravest first; what would change that; and the numbers."""
    order = (Verdict.FAIL, Verdict.ERROR, Verdict.HOLD, Verdict.PASS)
    needed = tuple(report.needs for report in seen.reports)
    would = [
        would if needs == "" and report.n else needs
        for report, needs, would in zip(seen.reports, needed, seen.nearest or needed, strict=True)
    ]
    told = sorted(zip(seen.reports, would, strict=True), key=lambda each: order.index(each[0].verdict))
    said = [[text(report.gate), _verdict(report), text(report.says)] for report, _ in told]
    listed = [f"- {text(report.gate)}: {text(needs)}" for report, needs in told if needs]
    numbers = [
        [text(report.gate), _interval(report), _number(report.threshold), f"{report.n:,}", text(report.unit)]
        for report, _ in told
        if report.estimate is not None
    ]
    blocks = [f"**Gates**, looked at {moment(seen.at)}", table(["gate", "verdict", "says"], said)]
    if listed:
        blocks += ["What would change it:", "\n".join(listed)]
    if numbers:
        blocks.append(table(["gate", "estimate (interval)", "threshold", "n", "unit"], numbers))
    return "\n\n".join(blocks)


def _verdict(report: GateReport) -> str:
    return "pass" if report.verdict is Verdict.PASS else f"**{report.verdict}**"


def _interval(report: GateReport) -> str:
    if report.estimate is None:
        return ""
    around = "" if report.low is None or report.high is None else f" ({report.low:.4g} to {report.high:.4g})"
    return f"{report.estimate:.4g}{around}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _to_do(state: Rollout) -> str:
    """What a person can do now."""
    model = state.model
    if state.phase is Phase.HALTED:
        back = f"`lockgate rollback {model} --reason …` brings the last proven version back"
        return f"`lockgate status` says who serves; `lockgate explain {model}` why; {back}."
    if state.phase is Phase.PROMOTED:
        return f"`lockgate rollback {model} --reason …` brings the former version back."
    if state.ended:
        return f"`lockgate explain {model}` says why, and what would have changed it."
    if state.phase is Phase.ROLLING_BACK:
        return "Nothing is to be done: the traffic goes back by itself."
    orders = f"`lockgate abort {model} --reason …` (or Cancel on its run) takes the traffic back at once"
    if state.paused_at is not None:
        return f"{orders}; `lockgate resume {model}` goes on."
    if state.phase in (Phase.SHADOW, Phase.CANARY):
        others = f"`lockgate pause {model}` stops the clock"
        if state.frozen is None:
            others += f"; `lockgate promote {model}` does not wait for the gates"
        return f"{orders}; {others}."
    return f"{orders}."


# ---------------------------------------------------------------- the stages


@dataclass
class Span:
    """A time in which the rollout stood in one stage."""

    state: Rollout
    since: float
    until: float | None = None
    looks: int = 0
    verdict: str = ""
    says: str = ""

    def line(self) -> dict[str, Any]:
        seconds = "" if self.until is None else f"{self.until - self.since:.0f}"
        return _line(self.state.label, weights(self.state), moment(self.since), seconds, self)


def stages(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A line for each stage, past and to come: its traffic, how long it took, how often it was looked at, its end."""
    spans: list[Span] = []
    state: Rollout | None = None
    for entry in entries:
        before = state
        state, _ = step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
        if spans and (evidence_of(entry) is not None or entry.kind == "checked"):
            spans[-1].looks += 1
            spans[-1].verdict, spans[-1].says = str(entry.body["verdict"]), str(entry.body["says"])
        if before is None or (before.phase, before.stage) != (state.phase, state.stage):
            if spans:
                spans[-1].until = entry.at
            spans.append(Span(state, entry.at, says=state.reason))
    assert state is not None
    return [*(span.line() for span in spans), *_to_come(state)]


def _to_come(state: Rollout) -> list[dict[str, Any]]:
    if state.phase not in (Phase.PENDING, Phase.SHADOW, Phase.CANARY):
        return []
    left = state.terms.stops[0 if state.phase is Phase.PENDING else state.stage + 1 :]
    return [
        _line(f"{stop.phase} {stop.weight or stop.shadow} %", (stop.weight, stop.shadow), "", f"≥ {stop.length_s:g}")
        for stop in left
    ]


def _line(
    stage: str, traffic: tuple[int, int] | None, since: str, seconds: str, span: Span | None = None
) -> dict[str, Any]:
    share, copies = ("as it was", "") if traffic is None else (f"{traffic[0]} %", f"{traffic[1]} %")
    return {
        "stage": stage,
        "traffic": share,
        "copies": copies,
        "since": since,
        "seconds": seconds,
        "looks": span.looks if span else "",
        "verdict": span.verdict if span else "",
        "says": span.says if span else "to come",
    }


# ---------------------------------------------------------------- the gates, for a table of their own


def rows(reports: Sequence[GateReport]) -> list[dict[str, Any]]:
    """The gates' reports as a table for people."""
    return [
        {
            "gate": report.gate,
            "verdict": str(report.verdict),
            "estimate": _number(report.estimate),
            "interval": f"{_number(report.low)} .. {_number(report.high)}",
            "threshold": _number(report.threshold),
            "unit": report.unit,
            "n": report.n,
            "says": report.says,
            "needs": report.needs,
        }
        for report in reports
    ]
