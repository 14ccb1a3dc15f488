"""The main flow: a version is registered, checked, let onto the traffic step by step, and promoted or taken back."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect import flow, get_run_logger
from prefect.context import FlowRunContext
from pydantic import BaseModel, Field

from flows.checks import Preparation, prepare, run_checks
from flows.form import PrefectForms
from flows.pages import Pages
from flows.policy import find, for_model, shelf_in
from flows.publish import Publisher, artifact_key
from flows.relay import Relay
from flows.rollout import Controller, Observer, Superseded, abort, over
from flows.settings import Settings
from flows.story import fold, story_of
from flows.triggers import REGISTRY
from flows.wiring import connect, herald, links
from policies.events import Requested, to_body
from policies.policy import Policy, PolicyError, Trigger, parse
from policies.rollout import OUTCOMES, Rollout, terms
from tasks.outcome import settle
from tasks.ports import BadInput, ModelVersion, NotThere, PortError, Ports, Refused, Submission
from tasks.registration import register
from tasks.report import publish_report

_PAGES_S = 120.0  # how long the report of an ended rollout waits for the pages that it links
_POLL_S = 1.0
_POLL_MAX_S = 5.0
_SILENCE_S = 3600.0
BEGIN_S = 30.0  # a claim whose rollout has not begun after this long belongs to a process that died


class Files(BaseModel):
    """What comes with the model. Files given for bytes that are registered already replace those kept with them."""

    validation: str | None = Field(None, description="Validation rows (CSV or Parquet), instead of the policy's.")
    reference: str | None = Field(None, description="A sample of the training rows.")
    expected: str | None = Field(None, description="Rows with the training framework's own predictions.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Metrics of the training.")


class Delivery(Files):
    """What to deliver, by which policy; written down with the rollout."""

    model: str = Field(description="Name of the registered model, e.g. flight-delay.")
    source: str = Field(description="An .onnx file, models:/name/version or runs:/id/path.")
    policy: str = Field(description="The policy's YAML text.")
    policy_folder: str = Field(".", description="Folder that the policy's relative paths start from.")
    target: str = Field("local", description="Where it shall run.")
    by: str = Field("", description="Who asked for it.")
    reason: str = Field("", description="Why.")


@dataclass(frozen=True)
class Outcome:
    """How a delivery ended. `unfinished`: not by a verdict, but because something could not be done."""

    rollout: str
    model: str
    version: str
    outcome: str
    reason: str
    seconds: float
    candidate_requests: int = 0
    candidate_errors: int = 0
    unfinished: bool = False
    report: str | None = None


def whoami() -> str:
    """This controller's name in the ledger: no other process has it."""
    return f"{_where()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"


def is_dead(who: str) -> bool:
    """Whether the controller was a process of this machine that has ended. Of others, nobody here can tell."""
    where, _, rest = who.partition("/")
    pid = rest.split("/")[0]
    if where != _where() or not pid.isdecimal():
        return False
    return not psutil.pid_exists(int(pid))


def _where() -> str:
    """The machine, and the space of process numbers on it: two containers may bear one name."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}:{space.stat().st_ino if space.exists() else ''}"


def directly(task: Any, *args: Any, name: str = "") -> Any:  # noqa: ARG001 - a Runner; only Prefect shows names
    """Runs a task's function without Prefect's engine: what must not wait for its server does not."""
    return task.fn(*args)


def in_prefect(task: Any, *args: Any, name: str = "") -> Any:
    """Runs a task in Prefect's engine, under a name that says what it is about."""
    return task.with_options(task_run_name=name)(*args) if name else task(*args)


@flow(name="deliver", flow_run_name="{model} → {target}: registering", retries=0)
def deliver(
    model: str,
    version: int | None = None,
    policy: str | None = None,
    source: str | None = None,
    files: Files | None = None,
    target: str = "local",
    reason: str = "",
    by: str = "",
) -> dict[str, Any]:
    """Registers the version and drives its rollout to the end; returns an `Outcome` as a dictionary.

    Args:
        model: Name of the registered model, e.g. flight-delay.
        version: Its version in the registry; by default the one that the alias `candidate` names.
        policy: Name of a policy (in the platform's folder of policies, or a ready-made one), a file's path on the
            worker's machine, or the YAML text. By default the one in that folder whose `model` this is.
        source: Instead of a version: an .onnx file, runs:/id/path or models:/name/version.
        files: What comes with the model: validation rows, a sample of the training rows, metrics.
        target: Where it shall run.
        reason: Why; it goes on the record.
        by: Who asked for it.

    Raises BadInput for what cannot be delivered at all (nothing has been changed then), PortError where a part of
    the platform cannot be reached.
    """
    ports = connect()
    relay = Relay(ports.ledger, herald(), PrefectForms())
    publisher = Publisher(flow_run_id(), target, ports.ledger, links, relay.pass_on)
    asked = str(version) if by == REGISTRY and version is not None else None
    alias: str | None = Trigger().name
    try:
        told = {"target": target, "reason": reason, "by": by}
        request = requested(Settings().shelf, model, version, policy, source, files, **told)
        alias = parse(request.policy).trigger.alias
        outcome = deliver_with(ports, request, [publisher, _log_moves()])
        if outcome.report is not None:
            publisher.link("report with plots", outcome.report)
        if asked is not None:  # another version may have had these bytes before
            _settle(ports, model, asked, alias, outcome.outcome, outcome.reason)
        return asdict(outcome)
    except (BadInput, NotThere, Refused, PolicyError) as exc:
        if asked is not None:
            _settle(ports, model, asked, alias, "refused", str(exc))
        raise
    finally:
        publisher.close()


def _settle(ports: Ports, model: str, version: str, alias: str | None, outcome: str, reason: str) -> None:
    """The registry's wish is answered; where that cannot be written down now, it is asked for again, and then it is."""
    try:
        in_prefect(settle, ports.registry, model, version, alias, outcome, reason, name="settle what was asked for")
    except PortError as exc:
        get_run_logger().warning("the registry could not be told: %s", exc)


def requested(
    shelf: Path,
    model: str,
    version: int | None,
    policy: str | None,
    source: str | None,
    files: Files | None,
    **told: str,
) -> Delivery:
    """The delivery that is asked for, its policy looked up. Raises BadInput, PolicyError."""
    if version is not None and source is not None:
        raise BadInput("say what to deliver with `version` or `source`, not with both")
    found = find(shelf, policy) if policy else shelf_in(shelf).policy_for(model)
    if found is None:
        unsound = "".join(f"; {why}" for why in shelf_in(shelf).unsound.values())
        raise BadInput(f"no policy in {shelf} says `model: {model}`; name one, or put one there{unsound}")
    return Delivery(
        model=model,
        source=source or (f"models:/{model}@candidate" if version is None else f"models:/{model}/{version}"),
        policy=found.text,
        policy_folder=str(found.folder),
        **(files or Files()).model_dump(),
        **told,
    )


def deliver_with(ports: Ports, request: Delivery, observers: list[Observer]) -> Outcome:
    """The delivery, on the given ports."""
    policy = for_model(parse(request.policy, "policy"), request.model)
    if policy.rollout.gates.drift is not None:
        ports.telemetry.warm()
    preparation = prepare(ports, policy, request_submission(request), Path(request.policy_folder))
    version = in_prefect(register, ports.registry, preparation.submission, name=f"register {request.model}")
    _refuse_pointless(ports, version)
    began = ports.clock.now()
    name = f"{version.model}-v{version.version}-{uuid.uuid4().hex[:8]}"
    turned_away = start(ports, policy, version, request, name)
    if turned_away is not None:
        return Outcome(name, version.model, version.version, "refused", turned_away, 0.0)
    pages = Pages(ports, whoami()) if ports.pages is not None and policy.rollout.gates.drift is not None else None
    if pages is not None:
        observers = [*observers, pages]
    state = to_the_end(ports, name, request.target, lambda: drive(ports, name, preparation, observers))
    seconds = ports.clock.now() - began
    if pages is not None:
        pages.close(_PAGES_S)
    return conclude(ports, name, state, seconds)


def start(ports: Ports, policy: Policy, version: ModelVersion, request: Delivery, name: str) -> str | None:
    """Makes it the model's active rollout and writes the request down; a sentence if it is turned away."""
    try:
        turned_away = _claim(ports, policy, version, request, name)
    except BaseException:
        with suppress(PortError):  # then those behind it in the queue wait until they see that it does not come
            ports.ledger.release(version.model, request.target, name)
        raise
    if turned_away is not None:
        return turned_away
    try:
        _refuse_pointless(ports, version)  # again: the rollout before it may have been of the same bytes
        stable = _baseline(ports, policy, version)
    except PortError:
        ports.ledger.release(version.model, request.target, name)
        raise
    # From here on it may have begun even if the answer is lost; then its claim stays, and `reconcile` finds it.
    _begin(ports, policy, version, stable, request, name)
    still_claimed(ports, version.model, request.target, name)
    return None


def still_claimed(ports: Ports, model: str, target: str, name: str) -> None:
    """A process that stood still for long between its claim and its request has lost the claim: its rollout goes back.

    Asked after the request is written: from then on nobody takes the claim away from it.
    """
    holder = ports.ledger.claim(model, target, name)
    if holder != name:
        abort(ports, name, whoami(), f"rollout {holder} came first")


def to_the_end(ports: Ports, name: str, target: str, drive: Callable[[], Rollout]) -> Rollout:
    """Drives the rollout, or follows it to its end where another controller has taken it over.

    The model is free for the next rollout only once this one is over: a controller that stops before leaves the claim.
    """
    try:
        state = drive()
    except Superseded:
        state = follow(ports, name)
    if over(state):
        ports.ledger.release(state.model, target, name)
    return state


def follow(ports: Ports, name: str) -> Rollout:
    """The rollout once it has ended, driven by others. Raises PortError if nothing is written for an hour."""
    written, since = 0, ports.clock.now()
    while ports.clock.now() - since < _SILENCE_S:
        if ports.ledger.read(name, after=written):
            entries = ports.ledger.read(name)
            state = fold(entries)
            if state is not None and over(state):
                return state
            written, since = len(entries), ports.clock.now()
        ports.clock.sleep(_POLL_S)
    raise PortError(f"rollout {name} was taken over, and nobody has gone on with it for {_SILENCE_S / 3600:.0f} h")


def request_submission(request: Delivery) -> Submission:
    """The request's part that goes into the registry."""

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    return Submission(
        model=request.model,
        source=request.source,
        validation=path(request.validation),
        reference=path(request.reference),
        expected=path(request.expected),
        metrics=request.metrics,
    )


def drive(ports: Ports, name: str, preparation: Preparation, observers: list[Observer]) -> Rollout:
    """Drives the rollout from where its ledger says that it stands."""

    def observe(progress: Any) -> None:
        for observer in observers:
            observer(progress)

    def checks(state: Rollout, policy: Policy) -> Any:
        return run_checks(ports, policy, state, preparation, in_prefect)

    return Controller(ports, name, whoami(), in_prefect, checks, observe).drive()


def conclude(ports: Ports, name: str, state: Rollout, seconds: float) -> Outcome:
    """The outcome in figures, with the report written, kept with the version's run and linked in Prefect."""
    link = None
    story = story_of(ports.ledger.read(name))
    try:
        version = ports.registry.version(state.model, state.candidate)
        link = in_prefect(
            publish_report,
            ports.registry,
            ports.reporter,
            version,
            story,
            artifact_key(state.model, "report"),
            name="report",
        )
    except PortError as exc:
        # The outcome stands in the ledger; a report that could not be kept can be made from there again.
        get_run_logger().warning("the report could not be kept: %s", exc)
    return outcome_of(ports, name, state, seconds, link)


def outcome_of(ports: Ports, name: str, state: Rollout, seconds: float, link: str | None = None) -> Outcome:
    """The outcome in figures. Raises PortError if the ledger cannot be read."""
    story = story_of(ports.ledger.read(name))
    return Outcome(
        rollout=name,
        model=state.model,
        version=state.candidate,
        outcome=OUTCOMES[state.phase],
        reason=state.reason,
        seconds=round(seconds, 1),
        candidate_requests=story.candidate_requests,
        candidate_errors=story.candidate_errors,
        unfinished=state.unfinished,
        report=link,
    )


def _refuse_pointless(ports: Ports, version: ModelVersion) -> None:
    """Bytes in quarantine, and the version that serves already, are refused before anything is touched."""
    why = ports.ledger.quarantined(version.digest)
    if why is not None:
        raise Refused(
            f"{version.model} v{version.version} has bytes that are in quarantine ({version.digest[:12]}…): {why}"
        )
    champion = ports.registry.by_alias(version.model, "champion")
    if champion is not None and champion.digest == version.digest:
        raise BadInput(f"{version.model} v{champion.version} has these bytes and is the champion already")


def _claim(ports: Ports, policy: Policy, version: ModelVersion, request: Delivery, name: str) -> str | None:
    """Makes this the model's active rollout, as the policy's `on_conflict` says; a sentence if it is turned away.

    Raises PortError when the ledger could not be asked for `BEGIN_S`.
    """
    waiting = _Waiting()
    asked = began = ports.clock.now()
    while True:
        try:
            turned_away = _wait_turn(ports, policy, version, request, name, waiting)
        except PortError:
            if ports.clock.now() - asked > BEGIN_S:
                raise
        else:
            asked = ports.clock.now()
            if turned_away is not None:
                break
        # Who has waited long asks less often: many may wait.
        ports.clock.sleep(min(_POLL_S + (ports.clock.now() - began) / 10, _POLL_MAX_S))
    if turned_away or not waiting.told:
        return turned_away or None
    newest = next(iter(ports.ledger.rollouts(version.model)), None)
    state = fold(ports.ledger.read(newest)) if newest else None
    if state is not None and _newer(state, version):  # it came, and went, while this one waited for an older one to end
        ports.ledger.release(version.model, request.target, name)
        return f"the newer v{state.candidate} has come meanwhile, and the policy says on_conflict: supersede"
    return None


@dataclass
class _Waiting:
    """What is known while a rollout waits: who is ahead of it and since when, and whom it has told to go."""

    ahead: str = ""
    since: float = 0.0
    told: set[str] = field(default_factory=set)


def _wait_turn(
    ports: Ports, policy: Policy, version: ModelVersion, request: Delivery, name: str, waiting: _Waiting
) -> str | None:
    """Nothing if it has to wait on, an empty sentence if it is the active rollout now, else why it is turned away."""
    rule = policy.rollout.on_conflict
    in_line = rule == "queue"
    while (other := ports.ledger.claim(version.model, request.target, name, in_line)) != name:
        state = fold(ports.ledger.read(other))
        if other != waiting.ahead:
            waiting.ahead, waiting.since = other, ports.clock.now()
        waited = ports.clock.now() - waiting.since
        if (state is None and waited > BEGIN_S) or (state is not None and over(state)):
            # Its controller died before it could, or before it began; or it was its turn, and it did not come.
            ports.ledger.release(version.model, request.target, other, unbegun=state is None)
            continue
        if state is not None and rule == "reject":
            return f"rollout {other} is under way, and the policy says on_conflict: reject"
        if state is not None and rule == "supersede" and _newer(state, version):
            return f"rollout {other} of the newer v{state.candidate} is under way"
        if state is not None and rule == "supersede" and other not in waiting.told:
            abort(ports, other, whoami(), f"superseded by v{version.version}")
            waiting.told.add(other)
        return None
    return ""


def _newer(state: Rollout, version: ModelVersion) -> bool:
    """Whether the rollout is of a later version: what was handed in later is not superseded by what came before."""
    numbers = state.candidate, version.version
    return all(number.isdecimal() for number in numbers) and int(numbers[0]) > int(numbers[1])


def _baseline(ports: Ports, policy: Policy, version: ModelVersion) -> str | None:
    """The last proven version: the one that the traffic goes to, or else the registry's champion."""
    route = ports.router.current(version.model)
    if route is not None and route.stable is not None:
        return route.stable
    champion = ports.registry.by_alias(version.model, "champion")
    if champion is None:
        if policy.rollout.first == "refuse":
            raise Refused(f"{version.model} has no version in service, and the policy says first: refuse")
        return None
    return champion.version


def _begin(
    ports: Ports, policy: Policy, version: ModelVersion, stable: str | None, request: Delivery, name: str
) -> None:
    """Writes the request down, with all that is needed to go on without this process."""
    event = Requested(
        at=ports.clock.now(),
        number=0,
        model=version.model,
        candidate=version.version,
        digest=version.digest,
        stable=stable,
        terms=terms(policy),
        reason=request.reason,
        by=request.by,
    )
    kind, body = to_body(event)
    extra = {
        "policy": policy.model_dump(mode="json", by_alias=True),
        "policy_digest": policy.digest,
        "request": request.model_dump(mode="json", exclude={"policy"}),
        "flow_run": str(run) if (run := flow_run_id()) else None,
    }
    ports.ledger.append(name, 1, event.at, request.by or whoami(), kind, {**body, **extra})


def flow_run_id() -> UUID | None:
    """The Prefect run that this is part of: whoever cancels that means the rollout."""
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None


def _log_moves() -> Callable[[Any], None]:
    """An observer that logs each move once, for the flow run's log."""
    logger = get_run_logger()
    seen: list[int] = []

    def observe(progress: Any) -> None:
        state: Rollout = progress.state
        if state.moved_by not in seen:
            seen.append(state.moved_by)
            logger.info(
                "%s v%s: %s%s", state.model, state.candidate, state.label, f" ({state.reason})" if state.reason else ""
            )

    return observe
