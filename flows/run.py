"""A command that drives a flow: connects, shows what happens, and turns how it ended into an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from flows.delivery import refuse_unfit
from flows.live import LiveView
from flows.overview import newest
from flows.settings import Settings
from flows.wiring import configure, connect, ledger, prefect_answers
from policies import audit
from policies.policy import PolicyError
from tasks.ports import BadInput, Ledger, NotThere, PortError, Refused

DONE, REFUSED, USAGE, UNFINISHED = 0, 1, 2, 3
_PATIENCE_S = 5.0  # of a way back with Prefect's server


def exit_code(outcome: dict[str, Any]) -> int:
    """0 promoted, 1 taken back or refused by a gate or a person, 3 where something could not be done."""
    if outcome["outcome"] == "promoted":
        return DONE
    return UNFINISHED if outcome["unfinished"] or outcome["outcome"] == "halted" else REFUSED


def guarded(
    work: Callable[[], dict[str, Any]], err: Console, code_of: Callable[[dict[str, Any]], int] = exit_code
) -> tuple[int, dict[str, Any] | None]:
    """The work's outcome and exit code; every foreseen error is one sentence and the code that goes with it."""
    try:
        outcome = work()
        return code_of(outcome), outcome
    except (PortError, PolicyError) as exc:
        err.print(f"lockgate: {exc}", markup=False)
        if isinstance(exc, (BadInput, NotThere, PolicyError)):
            return USAGE, None
        return (REFUSED if isinstance(exc, Refused) else UNFINISHED), None


def run_delivery(
    settings: Settings, request: dict[str, Any], out: Console | None, err: Console
) -> tuple[int, dict[str, Any] | None]:
    """Delivers on the running platform, with the live view on `out`; exit code and outcome."""

    def work() -> dict[str, Any]:
        refuse_unfit(request)
        configure(settings)
        if not prefect_answers(settings):
            raise PortError("Prefect's server does not answer, and nothing was begun; see: lockgate doctor")
        if out is not None:
            out.print(f"{request['model']}: looking at what was handed in, and registering it", markup=False)
        from flows.deliver import deliver

        with follow(out, ledger(settings), request["model"]):
            outcome: dict[str, Any] = deliver(by=settings.person, **request)
            return outcome

    code, outcome = guarded(work, err)
    if outcome is not None and out is not None:
        say_outcome(outcome, out)
    return code, outcome


def run_rollback(
    settings: Settings, model: str, reason: str, out: Console | None, err: Console
) -> tuple[int, dict[str, Any] | None]:
    """Takes the model back; exit code 0 once the version that was to go serves no more."""

    def work() -> dict[str, Any]:
        configure(settings)
        alone = not prefect_answers(settings, _PATIENCE_S)
        if alone:
            err.print("lockgate: Prefect's server does not answer: going back without it", markup=False)
        from flows.rollback import ORDERED, rollback, rollback_without_prefect

        with follow(out, ledger(settings), model):
            go_back = rollback_without_prefect if alone else rollback
            return dict(go_back(model, audit.clean(reason) or ORDERED, settings.person))

    def code_of(outcome: dict[str, Any]) -> int:
        from flows.rollback import is_gone

        return DONE if is_gone(ledger(settings), outcome) else exit_code(outcome) or REFUSED

    code, outcome = guarded(work, err, code_of)
    if outcome is not None and out is not None:
        say_outcome(outcome, out)
    return code, outcome


def run_rehearsal(
    settings: Settings, asked: dict[str, Any], out: Console | None, err: Console
) -> tuple[int, dict[str, Any] | None]:
    """A rollout played on recorded traffic; exit code 0 promoted, 1 taken back, 3 where the recording was too short."""

    def work() -> dict[str, Any]:
        configure(settings)
        if not prefect_answers(settings):
            raise PortError("Prefect's server does not answer; see: lockgate doctor")
        from flows.rehearse import lines, rehearse

        seen: dict[str, Any] = rehearse(**asked)
        if out is not None:
            out.print("\n".join(lines(seen)), markup=False)
        return seen

    codes = {"promoted": DONE, "rolled_back": REFUSED}
    return guarded(work, err, lambda seen: codes.get(seen["outcome"], UNFINISHED))


def run_monitor(
    settings: Settings, model: str, policy: str | None, out: Console | None, err: Console
) -> tuple[int, dict[str, Any] | None]:
    """One look at a model; exit code 0 only where it was shown that nothing is amiss."""

    def work() -> dict[str, Any]:
        configure(settings)
        from flows.monitor import CouldNotLook, monitor

        try:
            (look,) = monitor(model, policy, at_once=True)
        except CouldNotLook as exc:
            (look,) = exc.looks
        return dict(look)

    codes = {"pass": DONE, "fail": REFUSED}
    code, look = guarded(work, err, lambda look: codes.get(look["verdict"], UNFINISHED))
    if look is not None and out is not None:
        say_look(look, out)
    return code, look


def say_look(look: dict[str, Any], out: Console) -> None:
    """The look, a line per question."""
    version = f" v{look['version']}" if look["version"] else ""
    out.print(f"{look['model']}{version}: {look['verdict']}: {look['says']}", markup=False)
    for report in look["reports"]:
        needs = f" (needs {report['needs']})" if report["needs"] else ""
        out.print(f"  {report['verdict']:<5} {report['gate']}: {report['says']}{needs}", markup=False)
    for what, why in look.get("errors", {}).items():
        out.print(f"  not done: {what}: {why}", markup=False)


def follow(out: Console | None, book: Ledger, model: str) -> AbstractContextManager[Any]:
    """A live view of the model's next rollout; nothing without a console."""
    if out is None:
        return nullcontext()
    before = newest(book, model)

    def current() -> str | None:
        name = newest(book, model)
        return name if name != before else None

    return LiveView(out, book, current)


def say_outcome(outcome: dict[str, Any], out: Console) -> None:
    """The outcome, in a few lines that stay."""
    out.print(
        f"{outcome['model']} v{outcome['version']}: {outcome['outcome'].replace('_', ' ')}"
        f" after {outcome['seconds']:.0f} s: {outcome['reason']}",
        markup=False,
    )
    if outcome.get("report"):
        out.print(f"report: {outcome['report']}", markup=False)


def give_order(settings: Settings, model: str, what: str, reason: str) -> str:
    """Writes a person's order for the model's rollout under way; what the state is then. Raises PortError."""
    from flows.orders import order
    from policies.rollout import Illegal

    ports = connect(settings)
    active = next(iter(ports.ledger.rollouts(model, active=True)), None)
    if active is None:
        raise BadInput(f"no rollout of '{model}' is under way")
    try:
        return order(ports, active, f"{settings.person}/{os.getpid()}", what, reason, settings.person).label
    except Illegal as exc:
        raise BadInput(f"{what} makes no sense now: {exc}") from exc
