"""Router on this machine: the node agent holds the routes, and Envoy carries them out."""

from __future__ import annotations

from pathlib import Path

from infra.agent_client import AgentClient, AgentError, route_in
from infra.target_local import mapped
from policies.traffic import Route


class EnvoyRouter:
    """The agent whose home folder is given."""

    def __init__(self, agent_home: Path) -> None:
        self._agent = AgentClient(agent_home)

    def apply(self, route: Route) -> None:
        try:
            self._agent.set_route(route)
        except AgentError as exc:
            raise mapped(exc) from exc

    def renew(self, model: str, epoch: int) -> None:
        try:
            self._agent.renew(model, epoch)
        except AgentError as exc:
            raise mapped(exc) from exc

    def current(self, model: str) -> Route | None:
        return self.routes().get(model)

    def routes(self) -> dict[str, Route]:
        try:
            models = self._agent.status()["models"]
        except AgentError as exc:
            raise mapped(exc) from exc
        return {name: route_in(held["route"]) for name, held in models.items() if held.get("route")}
