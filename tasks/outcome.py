"""What became of a version: aliases, tags, quarantine."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from policies import audit
from policies.rollout import OUTCOMES, Rollout
from policies.triggers import OUTCOME_TAG
from tasks.ports import Ledger, Registry


@task(name="set aliases", timeout_seconds=60, cache_policy=NO_CACHE)
def set_champion(registry: Registry, model: str, version: str, previous: str | None) -> None:
    """`champion` names the version, and `previous` the one before it."""
    registry.set_alias(model, "previous", previous if previous != version else None)
    registry.set_alias(model, "champion", version)


@task(name="tag the version", timeout_seconds=60, cache_policy=NO_CACHE)
def tell(registry: Registry, rollout: str, state: Rollout, at: float, alias: str | None) -> None:
    """The version's tags say what happened to it, when, why and where that is written down.

    The alias that may have asked for it is taken off: set anew, it asks anew.
    """
    registry.tag(
        state.model,
        state.candidate,
        {
            OUTCOME_TAG: OUTCOMES.get(state.phase, str(state.phase)),
            "lockgate.reason": state.reason,
            "lockgate.at": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
            "lockgate.rollout": rollout,
        },
    )
    if alias is not None:
        registry.drop_alias(state.model, alias, state.candidate)


@task(name="settle what was asked for", timeout_seconds=60, cache_policy=NO_CACHE)
def settle(registry: Registry, model: str, version: str, alias: str | None, outcome: str, reason: str) -> None:
    """What the registry asked for came to an end without a rollout of this version: it is not asked for any more."""
    listed = next((each for each in registry.listed(model) if each.version == version), None)
    if listed is not None and OUTCOME_TAG not in listed.tags:
        registry.tag(model, version, {OUTCOME_TAG: outcome, "lockgate.reason": reason})
    if alias is not None:
        registry.drop_alias(model, alias, version)


@task(name="quarantine", timeout_seconds=60, cache_policy=NO_CACHE)
def quarantine(ledger: Ledger, rollout: str, state: Rollout, reason: str) -> None:
    """These bytes are refused from now on, under whatever name they come."""
    ledger.quarantine(state.digest, audit.clean(reason), rollout)
