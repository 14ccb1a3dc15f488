"""Target on this machine: the node agent runs the versions as processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from infra.agent_client import AgentAbsent, AgentClient, AgentError, AgentRefused, AgentRejected
from tasks.ports import BadInput, Deployment, Endpoint, PortError, Refused

_READY_S = 60.0
_TRIAL = ".trial"


def mapped(exc: AgentError) -> PortError:
    """The agent's error as the ports' own."""
    if isinstance(exc, AgentRefused):
        return Refused(str(exc))
    if isinstance(exc, AgentRejected):
        return BadInput(str(exc))
    return PortError(str(exc))


class LocalTarget:
    """The agent whose home folder is given. A trial runs as model `NAME.trial`, so that nothing of it mixes."""

    def __init__(self, agent_home: Path) -> None:
        self._home = agent_home
        self._agent = AgentClient(agent_home)

    def deploy(self, deployment: Deployment, trial: bool = False) -> list[Endpoint]:
        model = deployment.model + (_TRIAL if trial else "")
        try:
            self._agent.deploy(
                model,
                deployment.version,
                deployment.onnx,
                deployment.digest,
                replicas=deployment.replicas,
                threads=deployment.threads,
                prediction_output=deployment.prediction_output,
                prediction_column=deployment.prediction_column,
                sample_share=0.0 if trial else 1.0,
                signature=deployment.signed or None,
                signed_by=deployment.signed_by if deployment.signed else (),
            )
            return self._await(model, deployment)
        except AgentError as exc:
            raise mapped(exc) from exc

    def undeploy(self, model: str, version: str, trial: bool = False) -> None:
        try:
            self._agent.undeploy(model + (_TRIAL if trial else ""), version)
        except AgentError as exc:
            raise mapped(exc) from exc

    def stored(self, digest: str) -> Path | None:
        path = self._home / "models" / f"{digest}.onnx"
        return path if path.is_file() else None

    def running(self, model: str) -> dict[str, str]:
        try:
            versions = self._versions(model)
        except AgentError as exc:
            raise mapped(exc) from exc
        return {name: held["digest"] for name, held in versions.items() if held["state"] == "ready"}

    def _versions(self, model: str) -> dict[str, Any]:
        held = self._agent.status()["models"].get(model) or {}
        return dict(held.get("versions", {}))

    def _await(self, model: str, deployment: Deployment) -> list[Endpoint]:
        """The endpoints once all replicas are ready. A server that refuses the bytes says so at once."""
        limit = time.monotonic() + _READY_S
        state: dict[str, Any] = {}
        while time.monotonic() < limit:
            state = self._versions(model).get(deployment.version, {})
            replicas = [each for each in state.get("replicas", ()) if each["ready"]]
            if state.get("state") == "ready" and len(replicas) >= deployment.replicas:
                number = (deployment.prediction_output, deployment.prediction_column)
                return [Endpoint(model, deployment.version, each["endpoint"], *number) for each in replicas]
            if state.get("state") == "failed":
                raise Refused(f"{model} v{deployment.version} does not start: {state.get('why') or 'it said nothing'}")
            time.sleep(0.05)
        raise AgentAbsent(
            f"{model} v{deployment.version} was not ready after {_READY_S:.0f} s: {state.get('why') or 'no word'}"
        )
