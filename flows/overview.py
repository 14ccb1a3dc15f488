"""How things stand: the platform, and each model with its champion, traffic and last verdict."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from flows.settings import Settings
from flows.story import Unreadable, fold, label_of
from flows.wiring import Addresses, connect, located
from policies.rollout import OUTCOMES
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
        "platform": {"Prefect": addresses.prefect, "MLflow": addresses.mlflow, "gateway": addresses.gateway}
        | ({"Evidently": addresses.evidently} if addresses.evidently else {}),
        "models": [_model(ports, model, routes.get(model), addresses) for model in models],
    }


def _delivered(ledger: Ledger) -> set[str]:
    """The models that have ever had a rollout. Only the newest one of each is read: the ledger knows the others."""
    models: set[str] = set()
    known: set[str] = set()
    for name in ledger.rollouts():
        if name not in known:
            model = str(ledger.read(name)[0].body["model"])
            models.add(model)
            known.update(ledger.rollouts(model))
    return models


def _model(ports: Ports, model: str, route: Route | None, addresses: Addresses) -> dict[str, Any]:
    name = newest(ports.ledger, model)
    entries = ports.ledger.read(name) if name else []
    run = entries[0].body.get("flow_run") if entries else None
    state, why = None, None
    try:
        state = fold(entries)
    except Unreadable as exc:
        why = str(exc)
    return {
        "model": model,
        "champion": _alias(ports, model, "champion"),
        "asked_for": _alias(ports, model, "candidate"),
        "traffic": _traffic(route),
        "rollout": name,
        "candidate": state.candidate if state else None,
        "state": label_of(state) if state else None,
        "reason": state.reason if state else why,
        "verdict": OUTCOMES[state.phase] if state and state.ended else str(state.verdict) if state else None,
        "links": {"MLflow": f"{addresses.mlflow}/#/models/{quote(model)}"}
        | ({"Prefect": f"{addresses.prefect}/runs/flow-run/{run}"} if run else {}),
    }


def _alias(ports: Ports, model: str, alias: str) -> str | None:
    """The version that the registry's alias names."""
    try:
        named = ports.registry.by_alias(model, alias)
    except PortError as exc:
        return f"unknown ({exc})"
    return named.version if named else None


def _traffic(route: Route | None) -> str:
    if route is None or (route.stable is None and route.candidate is None):
        return "none"
    if route.candidate is None:
        return f"v{route.stable} 100 %"
    copies = f", {route.shadow} % copied" if route.shadow else ""
    return f"v{route.stable} {100 - route.weight} %, v{route.candidate} {route.weight} %{copies}"
