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
    """The route that a ROUTE effect asks for. It carries a lease wherever there is a stable version to go back to, and
    `continues` where whoever asks has seen the candidate's share in force."""
    if effect.version is not None or not (effect.weight or effect.shadow):
        return Route(state.model, stable=effect.version, epoch=effect.asked_by, timeout_s=policy.timeout)
    return Route(
        model=state.model,
        stable=state.stable,
        candidate=state.candidate,
        weight=effect.weight,
        shadow=effect.shadow,
        epoch=effect.asked_by,
        lease_s=policy.lease if state.stable else None,
        key=policy.audience.key,
        rules=policy.audience.rules,
        timeout_s=policy.timeout,
        continues=had_share and state.stable is not None,
    )


@task(name="route", timeout_seconds=60, cache_policy=NO_CACHE)
def set_traffic(router: Router, route: Route) -> None:
    """The route is in force when this returns."""
    router.apply(route)
