"""Whose turn it is: one active rollout per model and target, the others wait, give way or are turned away."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from flows.delivery import Delivery
from flows.orders import abort, over
from flows.runner import flow_run_id, whoami
from flows.story import fold, is_way_back
from policies.events import Requested, to_body
from policies.policy import Policy
from policies.rollout import Rollout, terms
from tasks.ports import SIGNED_TAG, BadInput, ModelVersion, PortError, Ports, Refused

_POLL_S = 1.0
_POLL_MAX_S = 5.0
BEGIN_S = 30.0  # a claim whose rollout has not begun after this long belongs to a process that died


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
        refuse_pointless(ports, version)  # again: the rollout before it may have been of the same bytes
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


def refuse_unsigned(ports: Ports, policy: Policy, version: ModelVersion) -> None:
    """Where the policy names keys, bytes that none of them has signed are refused before anything is touched."""
    keys = policy.governance.public_keys
    if not keys:
        return
    what = f"{version.model} v{version.version}"
    if not version.signed:
        raise Refused(
            f"{what} is not signed, and the policy asks for it (governance: signed_by): sign its model.onnx and set the"
            f" signature as the version's tag {SIGNED_TAG}, or hand the file in with its .sig beside it"
        )
    try:
        ports.inspector.signed(ports.registry.fetch(version).onnx, version.signed, keys)
    except Refused as exc:
        raise Refused(f"{what}: {exc} (governance: signed_by)") from exc


def refuse_pointless(ports: Ports, version: ModelVersion) -> None:
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
        entries = ports.ledger.read(other)
        state = fold(entries)
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
        if rule == "supersede" and other not in waiting.told and entries and not is_way_back(entries):
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
        signed=version.signed if policy.governance.public_keys else "",
    )
    kind, body = to_body(event)
    extra = {
        "policy": policy.model_dump(mode="json", by_alias=True),
        "policy_digest": policy.digest,
        "request": request.model_dump(mode="json", exclude={"policy"}),
        "flow_run": str(run) if (run := flow_run_id()) else None,
    }
    ports.ledger.append(name, 1, event.at, request.by or whoami(), kind, {**body, **extra})
