"""The form in which people approve or refuse in the Prefect UI: a run that waits, suspended, for its input.

No process waits with it, so it outlives the worker. What is answered is written by the code of `lockgate approve`. An
open-source Prefect server knows no people: the name in the form is as good as the access to the UI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prefect import flow, get_run_logger, suspend_flow_run
from prefect.context import FlowRunContext
from prefect.input import RunInput
from pydantic import Field, create_model

from flows.approval import answer, page, stands
from flows.deployments import POOL
from flows.settings import Settings
from flows.wiring import SystemClock, ledger, prefect_client
from policies.rollout import Illegal, Rollout
from tasks.ports import Clock, Ledger, PortError

FORM = "lockgate-approval"  # the tag of these runs
_TIMEOUT_S = 365 * 86400  # the policy's own limit comes first: then the run is ended from outside
_TRIES = 5  # forms for one question, where a form was cancelled or has crashed


@flow(name="approval", retries=0)
def approval(rollout: str, question: int) -> str:
    """Asks people in the UI whether a rollout may go on, and writes their answers down; returns how it ended.

    Such runs start by themselves, one for each question. Resume it to answer.

    Args:
        rollout: The rollout that asks, as its page names it.
        question: The ledger's entry that asked.
    """
    book, clock, log = ledger(Settings()), SystemClock(), get_run_logger()
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    asked_before = context.flow_run.empirical_policy.pause_keys or set()
    turn = max((int(key) for key in asked_before), default=0)
    objection = ""
    if turn:
        asked = stands(book, rollout, question, clock.now())
        if asked is None:
            return _over(rollout)
        said = suspend_flow_run(wait_for_input=form(asked), timeout=_TIMEOUT_S, key=str(turn))
        objection = take(book, clock, asked, said, f"{context.flow_run.id}/{turn}")
        log.info("%s by %s: %s", said.answer, said.by, objection or "written down")
    asked = stands(book, rollout, question, clock.now())
    if asked is None:
        return _over(rollout)
    suspend_flow_run(wait_for_input=form(asked, objection), timeout=_TIMEOUT_S, key=str(turn + 1))
    return _over(rollout)  # not reached: a run that has suspended ends here, and begins anew when it is resumed


def _over(rollout: str) -> str:
    return f"{rollout} asks nobody any more"


class Answer(RunInput):
    """What a person says."""

    answer: Literal["approve", "refuse"] = Field(description="To refuse takes the candidate back at once.")
    by: str = Field(description="Who you are: one of those whom the policy names.")
    reason: str = Field(min_length=1, description="Why; it goes on the record.")
    ticket: str = Field("", description="The change's number elsewhere, e.g. CHG-42.")


def form(asked: dict[str, Any], objection: str = "") -> type[Answer]:
    """The form, with the people to choose from, and what is shown above it."""
    described = Answer.model_fields["by"].description
    by = Field(description=described, json_schema_extra={"enum": asked["by"]})
    made = create_model("Answer", __base__=Answer, by=(str, by))
    return made.with_initial_data(description=page(asked, objection))


def take(book: Ledger, clock: Clock, asked: dict[str, Any], said: Answer, key: str) -> str:
    """The answer is on the ledger, once for the key; else why it cannot be taken. Raises PortError."""
    if any(entry.body.get("form") == key for entry in book.read(asked["rollout"])):
        return ""
    try:
        answer(book, clock, asked, said.by, said.answer, said.reason, said.ticket, via="Prefect form", form=key)
    except Illegal as exc:
        return str(exc)
    return ""


# ---------------------------------------------------------------- opened and closed


@dataclass(frozen=True)
class Wanted:
    """A form that shall be there for the question; `name` is its run's."""

    rollout: str
    question: int
    name: str

    @property
    def key(self) -> str:
        return f"{self.rollout}:{self.question}"


def wanted(rollouts: Mapping[str, Rollout]) -> list[Wanted]:
    """The forms that shall be there."""
    found = []
    for name, state in rollouts.items():
        if state.question is not None:
            stops, to = state.terms.stops, state.question.to
            what = "the promotion" if to >= len(stops) else f"{stops[to].phase} {stops[to].weight} %"
            shown = f"{state.model} v{state.candidate}: approve {what}?"
            found.append(Wanted(name, state.question.number, shown))
    return found


class Forms(Protocol):
    """Where the forms are."""

    def keep(self, wanted: Sequence[Wanted]) -> None:
        """Each of them is there, once; those whose question is over are closed. Raises PortError."""


class PrefectForms:
    """`Forms` as runs on the Prefect server that the environment names."""

    def keep(self, wanted: Sequence[Wanted]) -> None:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterTags
        from prefect.client.schemas.filters import FlowRunFilterStateType as Types
        from prefect.client.schemas.objects import TERMINAL_STATES, StateType
        from prefect.states import Completed

        live = [kind for kind in StateType if kind not in TERMINAL_STATES]
        with prefect_client() as server:
            open_now = server.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    tags=FlowRunFilterTags(all_=[FORM]), state=FlowRunFilterState(type=Types(any_=live))
                )
            )
            asked = {each.key for each in wanted}
            for run in open_now:
                key = f"{run.parameters.get('rollout')}:{run.parameters.get('question')}"
                if key not in asked and run.state is not None and run.state.is_paused():
                    message = "The question is over: it was answered elsewhere, or the rollout has moved on."
                    server.set_flow_run_state(run.id, Completed(name="Answered", message=message), force=True)
            there = {f"{run.parameters.get('rollout')}:{run.parameters.get('question')}" for run in open_now}
            for each in wanted:
                if each.key not in there:
                    self._open(server, each)

    def _open(self, server: Any, each: Wanted) -> None:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
        from prefect.exceptions import ObjectNotFound

        mine = f"{FORM}: {each.key}"
        before = server.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[mine])))
        if len(before) >= _TRIES:
            return  # `lockgate approve` is always there
        try:
            deployment = server.read_deployment_by_name("approval/approval")
        except ObjectNotFound as exc:
            raise PortError("the Prefect server has no deployment approval/approval yet; the worker brings it") from exc
        server.create_flow_run_from_deployment(
            deployment.id,
            parameters={"rollout": each.rollout, "question": each.question},
            name=each.name,
            tags=[POOL, FORM, mine],
            idempotency_key=f"{mine}#{len(before)}",
        )
