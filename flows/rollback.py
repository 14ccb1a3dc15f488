"""Back to the former version: a delivery under way is aborted; else the last proven version is rolled out again.

A manual rollback is a rollout whose candidate is the former champion: the same machine, no second path. It has no
stages (the version was proven before), and needs neither the registry nor the network to the artifact store. Whoever
asks for one while another is under way follows that one to its end: to abort it would leave the bad version serving.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from prefect import flow

from flows.deliver import Outcome, conclude, follow, outcome_of, to_the_end
from flows.orders import abort, over
from flows.publish import Publisher
from flows.rollout import Controller
from flows.runner import Runner, directly, flow_run_id, in_prefect, is_dead, whoami
from flows.story import fold, is_way_back, policy_of, readable, story_of
from flows.turn import BEGIN_S, still_claimed
from flows.wiring import connect, links
from policies import audit
from policies.events import Phase, Requested, to_body
from policies.rollout import Rollout
from policies.verdict import GateReport, Verdict
from tasks.ports import Entry, Ledger, NotThere, PortError, Ports, Refused

ORDERED = "rollback ordered by hand"
_WAIT_S = 300.0


@flow(name="rollback", flow_run_name="{model} → local: rolling back")
def rollback(model: str, reason: str = ORDERED, by: str = "") -> dict[str, Any]:
    """Takes the model back; returns an `Outcome` as a dictionary. Raises NotThere with nothing to go back to.

    Args:
        model: Name of the registered model, e.g. flight-delay.
        reason: Why; it goes on the record.
        by: Who asked for it.
    """
    ports = connect()
    publisher = Publisher(flow_run_id(), "local", ports.ledger, links)
    try:
        return asdict(rollback_with(ports, model, reason, by or whoami(), publisher))
    finally:
        publisher.close()


def rollback_with(ports: Ports, model: str, reason: str, by: str, observer: Any) -> Outcome:
    """The rollback, on the given ports."""
    began = ports.clock.now()
    name, state = take_back(ports, model, reason, by, observer, in_prefect)
    return conclude(ports, name, state, ports.clock.now() - began)


def rollback_without_prefect(model: str, reason: str, by: str) -> dict[str, Any]:
    """The same while Prefect's server is away: it knows nothing of it, and no report is kept; the ledger has it all."""
    ports = connect()
    began = ports.clock.now()
    name, state = take_back(ports, model, reason, by, lambda _progress: None, directly)
    return asdict(outcome_of(story_of(ports.ledger.read(name)), state, ports.clock.now() - began))


def take_back(
    ports: Ports, model: str, reason: str, by: str, observer: Any, run: Runner, only: str | None = None
) -> tuple[str, Rollout]:
    """The delivery that went back, or the rollback that brought the former version back, at its end.

    With `only`, the version that must not go on serving, it raises Refused where another serves by now, and PortError
    while a rollout is under way: what has come meanwhile is not guilty of it.
    """
    by, reason = audit.clean_name(by), audit.clean(reason)  # no way back is refused for a character
    name = f"{model}-back-{uuid.uuid4().hex[:8]}"
    while (active := _active(ports, model, name, observer, run)) != name:
        if only is not None:
            raise PortError(f"v{only} is not taken back yet: rollout {active} is under way")
        state = _end(ports, active, by, reason, observer, run)
        if state.phase is not Phase.PROMOTED or is_way_back(ports.ledger.read(active)):
            return active, state
        # A delivery that was faster than the order: it is what serves now, and goes like any other.
    try:
        _refuse_another(ports, model, only)
        former, entries = _former(ports, model)  # not before the claim: until then another version may come to serve
        policy_of(entries)  # before anything is written that could not be gone on with
    except BaseException:
        ports.ledger.release(model, "local", name)
        raise
    _begin(ports, former, entries, name, by, reason)
    still_claimed(ports, model, "local", name)
    return name, _drive(ports, name, observer, run)


def is_gone(ledger: Ledger, outcome: Mapping[str, Any]) -> bool:
    """Whether the version that `take_back` was to take back serves no more: a delivery went back or never began, or
    a rollback brought the former version."""
    wanted = {"promoted"} if is_way_back(ledger.read(outcome["rollout"])) else {"rolled_back", "refused"}
    return outcome["outcome"] in wanted and not outcome["unfinished"]


def _drive(ports: Ports, name: str, observer: Any, run: Runner) -> Rollout:
    return to_the_end(ports, name, "local", Controller(ports, name, whoami(), run, proven_before, observer).drive)


def _active(ports: Ports, model: str, name: str, observer: Any, run: Runner) -> str:
    """The rollout that is under way, else the one of this name, which has the claim then."""
    for active in ports.ledger.rollouts(model, active=True):
        if readable(ports.ledger.read(active)) is not None:  # else it counts by its claim alone
            return active
    return _claim(ports, model, name, observer, run)


def _claim(ports: Ports, model: str, name: str, observer: Any, run: Runner) -> str:
    """The rollout's name, or that of one that came first and is under way. A dead one's claim is in nobody's way."""
    limit = ports.clock.now() + BEGIN_S
    while (holder := ports.ledger.claim(model, "local", name)) != name:
        state = fold(ports.ledger.read(holder))
        if state is not None and not state.ended:
            return holder
        if state is not None and not over(state):  # ended, but its controller died before the traffic was set
            state = _drive(ports, holder, observer, run)
        if (state is not None and over(state)) or ports.clock.now() >= limit:
            ports.ledger.release(model, "local", holder, unbegun=state is None)
        else:
            ports.clock.sleep(0.2)
    return name


def _end(ports: Ports, active: str, by: str, reason: str, observer: Any, run: Runner) -> Rollout:
    """The end of what is under way: a delivery is told to go back, a rollback goes on, whoever had asked for it."""
    entries = ports.ledger.read(active)
    state = fold(entries)
    if state is None or not is_way_back(entries):
        return _abort(ports, active, by, reason)
    state = _drive(ports, active, observer, run) if is_dead(state.holder) else follow(ports, active)
    return replace(state, reason=f"rollback {active} was under way already: {state.reason}")


def _refuse_another(ports: Ports, model: str, only: str | None) -> None:
    route = ports.router.current(model)
    serving = route.stable if route else None
    if only not in (None, serving):
        raise Refused(f"v{only} is not taken back: v{serving} serves by now")


def _abort(ports: Ports, active: str, by: str, reason: str) -> Rollout:
    """Orders the rollout under way to go back, and waits until it has."""
    began = ports.clock.now()
    state = fold(ports.ledger.read(active))
    if state is None:
        raise PortError(f"rollout {active} has just been claimed and not begun; try again")
    abort(ports, active, by, reason)
    while ports.clock.now() - began < _WAIT_S:
        state = fold(ports.ledger.read(active))
        if state is not None and state.ended and not state.pending:
            return state
        ports.clock.sleep(0.2)
    raise PortError(f"rollout {active} was told to go back, but nobody has carried it out in {_WAIT_S:.0f} s")


def _former(ports: Ports, model: str) -> tuple[Rollout, list[Entry]]:
    """The last promoted rollout of a version that is not in service, not in quarantine, and was not taken back by a
    rollback since, with its entries."""
    route = ports.router.current(model)
    serving = route.stable if route else None
    not_these = {serving}
    for name in ports.ledger.rollouts(model):
        entries = ports.ledger.read(name)
        state = readable(entries)
        if state is None or state.phase is not Phase.PROMOTED:
            continue
        if state.candidate not in not_these and ports.ledger.quarantined(state.digest) is None:
            return state, entries
        not_these.add(entries[0].body.get("back_from"))
    raise NotThere(
        f"{model} has no former version to go back to; it serves v{serving}. What was taken back can be delivered anew"
    )


def _begin(ports: Ports, former: Rollout, entries: list[Entry], name: str, by: str, reason: str) -> None:
    route = ports.router.current(former.model)
    event = Requested(
        at=ports.clock.now(),
        number=0,
        model=former.model,
        candidate=former.candidate,
        digest=former.digest,
        stable=route.stable if route else None,
        terms=replace(former.terms, stops=(), watch_s=0.0, watch_shadow=0, approvals=None, freeze=()),
        reason=reason,
        by=by,
        signed=former.signed,
    )
    kind, body = to_body(event)
    more = {"back_from": event.stable, "shown_by": str(run) if (run := flow_run_id()) else None}
    kept = {key: entries[0].body[key] for key in ("policy", "policy_digest")}
    ports.ledger.append(name, 1, event.at, by, kind, audit.clean({**body, **kept, **more}))


def proven_before(state: Rollout, _policy: Any) -> list[GateReport]:
    return [GateReport("proven", Verdict.PASS, f"v{state.candidate} was promoted before")]
