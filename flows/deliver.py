"""The main flow: a version is registered, checked, let onto the traffic step by step, and promoted or taken back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.checks import Preparation, prepare, run_checks
from flows.delivery import Delivery, Files, request_submission, requested
from flows.form import PrefectForms
from flows.letting_go import on_cancelled, on_crashed
from flows.orders import over
from flows.pages import Pages
from flows.policy import for_model
from flows.publish import Publisher, artifact_key
from flows.relay import Relay
from flows.rollout import Controller, Observer, Superseded
from flows.runner import flow_run_id, in_prefect, whoami
from flows.settings import Settings
from flows.story import fold, story_of
from flows.triggers import REGISTRY
from flows.turn import refuse_pointless, refuse_unsigned, start
from flows.wiring import connect, herald, links
from policies.policy import Policy, PolicyError, Trigger
from policies.policy_yaml import parse
from policies.rollout import OUTCOMES, Rollout
from tasks.outcome import settle
from tasks.ports import BadInput, NotThere, PortError, Ports, Refused, Story
from tasks.registration import register
from tasks.report import publish_report

_PAGES_S = 120.0  # how long the report of an ended rollout waits for the pages that it links
_POLL_S = 1.0
_SILENCE_S = 3600.0


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


@flow(
    name="deliver",
    flow_run_name="{model} → {target}: registering",
    retries=0,
    on_cancellation=[on_cancelled],
    on_crashed=[on_crashed],
)
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
    relay = Relay(ports.ledger, herald(ports.ledger), PrefectForms())
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


def deliver_with(ports: Ports, request: Delivery, observers: list[Observer]) -> Outcome:
    """The delivery, on the given ports."""
    policy = for_model(parse(request.policy, "policy"), request.model)
    if policy.rollout.gates.drift is not None:
        ports.telemetry.warm()
    preparation = prepare(ports, policy, request_submission(request), Path(request.policy_folder))
    version = in_prefect(register, ports.registry, preparation.submission, name=f"register {request.model}")
    refuse_pointless(ports, version)
    refuse_unsigned(ports, policy, version)
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
    raise PortError(f"rollout {name} is somebody else's, and nobody has gone on with it for {_SILENCE_S / 3600:.0f} h")


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
    return outcome_of(story, state, seconds, link)


def outcome_of(story: Story, state: Rollout, seconds: float, link: str | None = None) -> Outcome:
    """The outcome in figures."""
    return Outcome(
        rollout=story.rollout,
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
