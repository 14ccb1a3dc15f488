"""Versions that run, and versions that run no more."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from policies.policy import Policy
from tasks.ports import Deployment, Endpoint, Target


def deployment(
    policy: Policy, model: str, version: str, digest: str, onnx: Path, trial: bool = False, signed: str = ""
) -> Deployment:
    """What the policy wants to run of a version; a trial is one replica. A candidate's signature is handed on."""
    return Deployment(
        model=model,
        version=version,
        digest=digest,
        onnx=onnx,
        replicas=1 if trial else policy.target.replicas,
        threads=policy.target.threads,
        prediction_output=policy.prediction.output,
        prediction_column=policy.prediction.column,
        signed=signed if policy.governance.public_keys else "",
        signed_by=policy.governance.public_keys,
    )


@task(name="deploy", timeout_seconds=300, cache_policy=NO_CACHE)
def deploy(target: Target, wanted: Deployment, trial: bool = False) -> list[Endpoint]:
    """The endpoints of the version's replicas, all of them ready, without live traffic."""
    return target.deploy(wanted, trial)


@task(name="undeploy", timeout_seconds=120, cache_policy=NO_CACHE)
def undeploy(target: Target, model: str, version: str, trial: bool = False) -> None:
    """The version finishes what it has accepted, and is gone."""
    target.undeploy(model, version, trial)
