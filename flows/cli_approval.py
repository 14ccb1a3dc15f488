"""`lockgate approve`: what people are asked, and their answer."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.settings import read_settings
from tasks.ports import BadInput

out = Console(highlight=False, soft_wrap=True)


def approve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name in the registry.")],
    reason: Annotated[str, typer.Option("--reason", help="Why. Without a reason it only shows.")] = "",
    ticket: Annotated[str, typer.Option("--ticket", help="The change's number elsewhere, e.g. CHG-42.")] = "",
    refuse: Annotated[bool, typer.Option("--refuse", help="Say no: the rollout goes back.")] = False,
    evidence: Annotated[
        str, typer.Option("--evidence", metavar="HASH", help="Answer only if it is asked on this evidence.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Show what a rollout asks approval for; with --reason, approve it, or --refuse it.

    It answers as the user of the operating system, or as LOCKGATE_USER: who you are here is as good as who may log in.
    """
    from flows.approval import answer, asked, lines
    from flows.wiring import SystemClock, ledger
    from policies.rollout import Illegal

    settings = read_settings()
    book, clock = ledger(settings), SystemClock()
    question = asked(book, model, clock.now())
    if not as_json:
        out.print("\n".join(lines(question)), markup=False)
    if not question["evidence_hash"].startswith(evidence):
        raise BadInput(f"it is asked on other evidence now ({question['evidence_hash'][:12]}, not {evidence[:12]})")
    document: dict[str, Any] = {"question": question}
    if reason:
        try:
            what = "refuse" if refuse else "approve"
            state = answer(book, clock, question, settings.person, what, reason, ticket, via="command line")
        except Illegal as exc:
            raise BadInput(str(exc)) from exc
        document |= {"answer": what, "by": settings.person, "state": state.label}
        if not as_json:
            said = "refused" if refuse else "approved"
            out.print(f"{said} by {settings.person}; {state.label}", markup=False)
    elif refuse:
        raise BadInput("say why it is refused, with --reason")
    elif not as_json:
        out.print("to approve: --reason; to refuse: --refuse --reason")
    if as_json:
        out.print_json(json.dumps(document))
