"""A fake Target: versions run as soon as they are asked for, except those in `refuses` and while `down`."""

from __future__ import annotations

from pathlib import Path

from tasks.ports import Deployment, Endpoint, PortError, Refused


class FakeTarget:
    """`tasks.ports.Target` in memory. `versions` has per (model, version) the digest; trials have `.trial` models."""

    def __init__(self) -> None:
        self.down = False
        self.refuses: set[str] = set()  # digests
        self.versions: dict[tuple[str, str], str] = {}
        self.deployed: list[Deployment] = []
        self.store: set[str] = set()
        self.busy: set[tuple[str, str]] = set()  # what the route sends traffic to

    def deploy(self, deployment: Deployment, trial: bool = False) -> list[Endpoint]:
        self._up()
        model = deployment.model + (".trial" if trial else "")
        if deployment.digest in self.refuses:
            raise Refused(f"{model} v{deployment.version} does not start: refused by the test")
        running = self.versions.get((model, deployment.version))
        if running not in (None, deployment.digest):
            raise Refused(f"{model} v{deployment.version} runs with other bytes")
        self.versions[model, deployment.version] = deployment.digest
        self.store.add(deployment.digest)
        self.deployed.append(deployment)
        number = (deployment.prediction_output, deployment.prediction_column)
        return [Endpoint(model, deployment.version, f"unix:/{model}/{i}", *number) for i in range(deployment.replicas)]

    def undeploy(self, model: str, version: str, trial: bool = False) -> None:
        self._up()
        key = (model + (".trial" if trial else ""), version)
        if key in self.busy:
            raise Refused(f"{model} v{version} gets traffic")
        self.versions.pop(key, None)

    def stored(self, digest: str) -> Path | None:
        return Path(f"/store/{digest}.onnx") if digest in self.store else None

    def running(self, model: str) -> dict[str, str]:
        self._up()
        return {version: digest for (name, version), digest in self.versions.items() if name == model}

    def _up(self) -> None:
        if self.down:
            raise PortError("the target is down (by the test)")
