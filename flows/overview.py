"""How things stand: the platform, and each model with its champion, traffic and last verdict."""

from __future__ import annotations

from typing import Any

from flows.live import Followed
from flows.settings import Settings
from flows.wiring import connect, located
from policies.traffic import Route
from tasks.ports import Ledger, PortError, Ports


def newest(ledger: Ledger, model: str) -> str | None:
    """The model's rollout that is under way, or else its last one."""
    return next(iter(ledger.rollouts(model)), None)


def overview(settings: Settings) -> dict[str, Any]:
    """The whole picture, JSON-able. Raises PortError if no platform runs."""
    addresses = located(settings)
    ports = connect(settings)
    routes = ports.router.routes()
    models = sorted({*routes, *_delivered(ports.ledger)})
    return {
        "platform": {"Prefect": addresses.prefect, "MLflow": addresses.mlflow, "gateway": addresses.gateway},
        "models": [_model(ports, model, routes.get(model)) for model in models],
    }


def _delivered(ledger: Ledger) -> set[str]:
    return {str(ledger.read(name)[0].body["model"]) for name in ledger.rollouts()}


def _model(ports: Ports, model: str, route: Route | None) -> dict[str, Any]:
    name = newest(ports.ledger, model)
    followed = Followed(ports.ledger, name) if name else None
    if followed:
        followed.read()
    state = followed.state if followed else None
    return {
        "model": model,
        "champion": _champion(ports, model),
        "traffic": _traffic(route),
        "rollout": name,
        "candidate": state.candidate if state else None,
        "state": state.label if state else None,
        "reason": state.reason if state else None,
        "verdict": str(state.verdict) if state and not state.ended else None,
    }


def _champion(ports: Ports, model: str) -> str | None:
    try:
        champion = ports.registry.by_alias(model, "champion")
    except PortError as exc:
        return f"unknown ({exc})"
    return champion.version if champion else None


def _traffic(route: Route | None) -> str:
    if route is None or (route.stable is None and route.candidate is None):
        return "none"
    if route.candidate is None:
        return f"v{route.stable} 100 %"
    copies = f", {route.shadow} % copied" if route.shadow else ""
    return f"v{route.stable} {100 - route.weight} %, v{route.candidate} {route.weight} %{copies}"
