"""The route of one model with its epoch and lease, as the node agent holds it. Pure: time comes in as a number.

`now` is seconds on a clock that never jumps (the machine's time since boot). What it decides:

- An older epoch is refused, and so is other content under the same epoch: two controllers cannot both be right.
- A candidate's share may grow only onto ready replicas. Taking it away needs no more than one ready stable replica.
- When the lease runs out the candidate's share ends. That epoch is then spent: only a newer one can give a share again,
  and only one that does not ask to go on with the share that ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from policies.traffic import Route, route_of
from serving.agent_errors import BadRequest, Conflict, NotReady


@dataclass(frozen=True)
class Lost:
    """A lease that ran out: whose it was, and when (POSIX seconds)."""

    epoch: int
    at: float


@dataclass(frozen=True)
class Held:
    """A route, when its lease was last renewed, and whether that lease was lost."""

    route: Route
    renewed: float
    lost: Lost | None = None

    def lease_left_s(self, now: float) -> float | None:
        """Seconds until the lease runs out, never below 0; None where nothing is leased."""
        if not leased(self.route) or self.route.lease_s is None:
            return None
        age = max(0.0, now - self.renewed)
        return max(0.0, self.route.lease_s - age)


@dataclass(frozen=True)
class Capacity:
    """How many replicas of a version were asked for, and how many are ready."""

    replicas: int
    ready: int


def leased(route: Route) -> bool:
    """Whether the candidate's share ends with the lease: it has one, and there is a stable version to go back to."""
    share = route.weight > 0 or route.shadow > 0
    return route.lease_s is not None and share and route.candidate is not None and route.stable is not None


def changed(held: Held | None, route: Route, capacity: Mapping[str, Capacity], now: float) -> Held:
    """The route taken on. Raises Conflict or NotReady, which has then changed nothing."""
    if held is not None:
        if route.epoch < held.route.epoch:
            raise Conflict(
                f"epoch {route.epoch} for {route.model} is older than the epoch {held.route.epoch} in force",
                epoch=held.route.epoch,
            )
        if route.continues and held.lost is not None:
            raise Conflict(
                f"the lease of epoch {held.lost.epoch} was lost, and with it the share that epoch {route.epoch} for"
                f" {route.model} would go on with",
                epoch=held.route.epoch,
                lease_lost=asdict(held.lost),
            )
        if route.epoch == held.route.epoch:
            _same_epoch(held, route)
    _check_capacity(route, capacity)
    return Held(route=route, renewed=now)


def _same_epoch(held: Held, route: Route) -> None:
    epoch = held.route.epoch
    if held.lost is not None:
        raise Conflict(
            f"the lease of epoch {epoch} was lost; take a new epoch", epoch=epoch, lease_lost=asdict(held.lost)
        )
    if route != held.route:
        raise Conflict(
            f"epoch {epoch} already stands for another route of {route.model}; take a new epoch", epoch=epoch
        )


def _check_capacity(route: Route, capacity: Mapping[str, Capacity]) -> None:
    stable_share = 100 - route.weight if route.stable is not None else 0
    needs_stable = stable_share > 0 or (route.weight == 100 and route.shadow > 0)
    if route.stable is not None and needs_stable and _ready(capacity, route.stable).ready == 0:
        raise NotReady(f"version {route.stable} of {route.model} has no ready replica to send the stable traffic to")
    if route.candidate is None or not (route.weight or route.shadow):
        return
    candidate = _ready(capacity, route.candidate)
    if candidate.ready == 0:
        raise NotReady(f"version {route.candidate} of {route.model} has no ready replica to send traffic to")
    if candidate.ready * 100 < route.weight * candidate.replicas:
        raise NotReady(
            f"{candidate.ready} of {candidate.replicas} replicas of version {route.candidate} of {route.model} are"
            f" ready: too few for a weight of {route.weight} %"
        )


def _ready(capacity: Mapping[str, Capacity], version: str) -> Capacity:
    return capacity.get(version, Capacity(replicas=0, ready=0))


def renewed(held: Held | None, model: str, epoch: int, now: float) -> Held:
    """The lease begun anew. Raises Conflict if it is not that epoch's any more, or was lost."""
    if held is None:
        raise Conflict(f"{model} has no route here, so there is no lease to renew", epoch=None)
    if epoch != held.route.epoch:
        raise Conflict(
            f"epoch {epoch} is not in force for {model}; epoch {held.route.epoch} is", epoch=held.route.epoch
        )
    left = held.lease_left_s(now)
    if held.lost is not None or left == 0.0:
        raise Conflict(f"the lease of epoch {epoch} for {model} was lost", epoch=epoch)
    return replace(held, renewed=now)


def ran_out(held: Held, now: float) -> bool:
    """Whether the lease is over and the candidate still has its share."""
    return held.lease_left_s(now) == 0.0


def back_on_stable(held: Held, at: float) -> Held:
    """All traffic on the stable version, the epoch spent. `at` is POSIX seconds, for the record."""
    route = replace(held.route, candidate=None, weight=0, shadow=0)
    return replace(held, route=route, lost=Lost(epoch=route.epoch, at=at))


def without_more(before: Route | None, after: Route) -> bool:
    """Whether the change takes from the candidate or leaves it as it was: such a change is never held up."""
    if after.weight == 0 and after.shadow == 0:
        return True
    if before is None or (before.candidate, before.rules) != (after.candidate, after.rules):
        return False
    return after.weight <= before.weight


def route_from(body: Mapping[str, Any], model: str) -> Route:
    """The route in a request. Raises BadRequest naming the field."""
    known = {field.name for field in fields(Route)}
    unknown = sorted(set(body) - known)
    if unknown:
        raise BadRequest(f"unknown field '{unknown[0]}' in the route; known are {', '.join(sorted(known))}")
    if body.get("model", model) != model:
        raise BadRequest(f"the route is for '{body['model']}', the path for '{model}'")
    for name in ("weight", "shadow", "epoch"):
        value = body.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadRequest(f"'{name}' must be a whole number, not {value!r}")
    for name in ("stable", "candidate"):
        if not isinstance(body.get(name), str | None):
            raise BadRequest(f"'{name}' must be a version or null, not {body[name]!r}")
    if not isinstance(body.get("continues", False), bool):
        raise BadRequest(f"'continues' must be true or false, not {body['continues']!r}")
    lease = body.get("lease_s")
    if lease is not None and (isinstance(lease, bool) or not isinstance(lease, int | float) or not 0 < lease < 86400):
        raise BadRequest(f"'lease_s' must be seconds between 0 and 86400, or null, not {lease!r}")
    timeout = body.get("timeout_s")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise BadRequest(f"'timeout_s' must be seconds or null, not {timeout!r}")
    try:
        return route_of({"stable": None, **body, "model": model})
    except KeyError as exc:
        raise BadRequest(f"{exc} is missing in one of the rules") from exc
    except (TypeError, ValueError) as exc:
        raise BadRequest(str(exc)) from exc
