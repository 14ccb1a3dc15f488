"""Speaks to the node agent over its Unix socket.

AgentError                the agent could not do it (its sentence is in the message, its facts in `facts`)
├── AgentAbsent             nobody listens, the connection broke, or it did not answer in time
├── AgentRefused            409: a stale epoch, a lost lease, other bytes, too little ready capacity
└── AgentRejected           400, 401, 404: the request itself cannot be used
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from infra.connection_unix import NotListening, ask
from policies.traffic import Route, route_of


class AgentError(Exception):
    """The agent could not do what it was asked."""

    def __init__(self, sentence: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.facts = dict(facts or {})


class AgentAbsent(AgentError):
    """No answer from the agent."""


class AgentRefused(AgentError):
    """The agent understood and said no."""


class AgentRejected(AgentError):
    """The request cannot be used."""


class AgentClient:
    """One agent, by its home folder. Safe to use from several threads; the agent may be silent for `timeout_s`."""

    def __init__(self, home: Path, timeout_s: float = 30.0) -> None:
        self._home = home
        self._socket = home / "agent.sock"
        self._timeout_s = timeout_s

    def status(self) -> dict[str, Any]:
        """Everything that runs and is routed there."""
        return self._ask("GET", "/v1/status")

    def deploy(
        self,
        model: str,
        version: str,
        path: Path,
        digest: str,
        replicas: int = 1,
        threads: int = 1,
        prediction_output: str | None = None,
        prediction_column: int = -1,
        sample_share: float = 1.0,
        signature: str | None = None,
        signed_by: Sequence[str] = (),
    ) -> None:
        """Kept there and being started (`status` says when it is ready). Idempotent."""
        body = {
            "path": str(path.resolve()),
            "digest": digest,
            "replicas": replicas,
            "threads": threads,
            "prediction_output": prediction_output,
            "prediction_column": prediction_column,
            "sample_share": sample_share,
            "signature": signature,
            "signed_by": list(signed_by),
        }
        self._ask("PUT", f"/v1/models/{_part(model)}/versions/{_part(version)}", body)

    def undeploy(self, model: str, version: str) -> None:
        """Drained and gone. Idempotent. Raises AgentRefused while the route sends it traffic."""
        self._ask("DELETE", f"/v1/models/{_part(model)}/versions/{_part(version)}")

    def set_route(self, route: Route) -> None:
        """In force when this returns. Raises AgentRefused for an older epoch or too little ready capacity."""
        self._ask("PUT", f"/v1/models/{_part(route.model)}/route", asdict(route))

    def renew(self, model: str, epoch: int) -> float | None:
        """The lease begun anew; how long it lasts. Raises AgentRefused if it is not that epoch's any more."""
        left = self._ask("POST", f"/v1/models/{_part(model)}/lease", {"epoch": epoch})["lease_left_s"]
        return None if left is None else float(left)

    def route(self, model: str) -> Route | None:
        """The route in force, if the model has one."""
        held = (self.status()["models"].get(model) or {}).get("route")
        return None if held is None else route_in(held)

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """What the agent did by itself after that event, oldest first."""
        return list(self._ask("GET", f"/v1/events?after={after}")["events"])

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            token = (self._home / "agent.token").read_text().strip()
        except OSError as exc:
            raise AgentAbsent(f"no agent has been started on {self._home} ({exc.strerror}): start it first") from exc
        headers = {"Authorization": f"Bearer {token}"}
        data = b"" if body is None else json.dumps(body).encode()
        what = f"{method} {path}"
        try:
            status, answer = ask(f"unix:{self._socket}", method, path, self._timeout_s, data, headers)
        except NotListening as exc:
            raise AgentAbsent(f"the agent does not listen on {self._socket}: is it running? ({exc})") from exc
        except TimeoutError as exc:
            raise AgentAbsent(f"the agent on {self._socket} did not answer {what} in time") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise AgentAbsent(f"the connection to the agent broke during {what}: {exc!r}") from exc
        return _answer(status, answer, what)


def route_in(held: Mapping[str, Any]) -> Route:
    """The route within a status answer."""
    return route_of({name: value for name, value in held.items() if name not in ("lease_left_s", "lease_lost")})


def _answer(status: int, answer: bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(answer)
    except ValueError as exc:
        shown = answer[:200].decode(errors="replace")
        raise AgentError(f"the agent's answer to {what} is not JSON: {shown!r}") from exc
    if 200 <= status < 300:
        return dict(body)
    sentence = str(body.get("error", f"status {status}"))
    if status == 409:
        raise AgentRefused(sentence, body)
    if 400 <= status < 500:
        raise AgentRejected(sentence, body)
    raise AgentError(sentence, body)


def _part(name: str) -> str:
    return quote(name, safe="")
