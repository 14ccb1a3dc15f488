"""What became of a version: aliases, tags, quarantine."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from policies.rollout import OUTCOMES, Rollout
from tasks.ports import Ledger, Registry


@task(name="set aliases", timeout_seconds=60, cache_policy=NO_CACHE)
def set_champion(registry: Registry, model: str, version: str, previous: str | None) -> None:
    """`champion` names the version, and `previous` the one before it."""
    registry.set_alias(model, "previous", previous if previous != version else None)
    registry.set_alias(model, "champion", version)


@task(name="tag the version", timeout_seconds=60, cache_policy=NO_CACHE)
def tell(registry: Registry, rollout: str, state: Rollout, at: float) -> None:
    """The version's tags say what happened to it, when, why and where that is written down."""
    registry.tag(
        state.model,
        state.candidate,
        {
            "lockgate.outcome": OUTCOMES.get(state.phase, str(state.phase)),
            "lockgate.reason": state.reason,
            "lockgate.at": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
            "lockgate.rollout": rollout,
        },
    )


@task(name="quarantine", timeout_seconds=60, cache_policy=NO_CACHE)
def quarantine(ledger: Ledger, rollout: str, state: Rollout, reason: str) -> None:
    """These bytes are refused from now on, under whatever name they come."""
    ledger.quarantine(state.digest, reason, rollout)
