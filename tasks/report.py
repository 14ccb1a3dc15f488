"""The story of a rollout, told so that it can be kept: a page with plots, made from the ledger alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from tasks.ports import ModelVersion, Registry, Reporter, Story


@task(name="report", retries=1, retry_delay_seconds=2, timeout_seconds=180, cache_policy=NO_CACHE)
def publish_report(registry: Registry, reporter: Reporter, version: ModelVersion, story: Story, key: str) -> str:
    """Writes the report, keeps it with the version's run, links it in Prefect; returns the link."""
    with TemporaryDirectory(prefix="lockgate-report-") as folder:
        page = reporter.write(story, Path(folder) / f"{story.rollout}.html")
        metrics = {
            "lockgate.seconds": story.ended - story.started,
            "lockgate.candidate_requests": float(story.candidate_requests),
            "lockgate.candidate_errors": float(story.candidate_errors),
        }
        link = registry.record(version, metrics, [page])
    create_link_artifact(link, link_text=f"Report of {story.rollout}", key=key)
    return link
