"""Who gets which requests: set, and kept alive."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from policies.events import Effect
from policies.policy import RolloutPolicy
from policies.rollout import Rollout
from policies.traffic import Route
from tasks.ports import Router


def route_for(state: Rollout, effect: Effect, policy: RolloutPolicy, had_share: bool = False) -> Route:
    """The route that a ROUTE effect asks for, which `continues` where whoever asks has seen the share in force.

    It carries a lease wherever something is tried out that the stable version would have to stand in for. Not where a
    rollback brings a former version back: its "stable" one is what is to go.
    """
    if effect.version is not None or not (effect.weight or effect.shadow):
        return Route(state.model, stable=effect.version, epoch=effect.asked_by, timeout_s=policy.timeout)
    tried = bool(state.terms.stops) or state.terms.watch_s > 0
    return Route(
        model=state.model,
        stable=state.stable,
        candidate=state.candidate,
        weight=effect.weight,
        shadow=effect.shadow,
        epoch=effect.asked_by,
        lease_s=policy.lease if state.stable and tried else None,
        key=policy.audience.key,
        rules=policy.audience.rules,
        timeout_s=policy.timeout,
        continues=had_share and state.stable is not None,
    )


@task(name="route", timeout_seconds=60, cache_policy=NO_CACHE)
def set_traffic(router: Router, route: Route) -> None:
    """The route is in force when this returns."""
    router.apply(route)
