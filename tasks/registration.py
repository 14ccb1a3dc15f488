"""Into the registry: a submission becomes a version with a digest."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.ports import BadInput, Bundle, ModelVersion, NotThere, Registry, Submission


def _worth_another_try(_task: object, _run: object, state: object) -> bool:
    """What the user gave will be no better the second time."""
    error = state.result(raise_on_failure=False)  # type: ignore[attr-defined]
    return not isinstance(error, (BadInput, NotThere))


@task(
    name="register",
    retries=2,
    retry_delay_seconds=[1, 4],
    timeout_seconds=300,
    cache_policy=NO_CACHE,
    retry_condition_fn=_worth_another_try,
)
def register(registry: Registry, submission: Submission) -> ModelVersion:
    """The version that holds the submission's bytes, new only if no version has them yet."""
    return registry.register(submission)


@task(name="fetch", retries=2, retry_delay_seconds=[1, 4], timeout_seconds=300, cache_policy=NO_CACHE)
def fetch(registry: Registry, version: ModelVersion) -> Bundle:
    """The version's files on this machine, digest checked."""
    return registry.fetch(version)
