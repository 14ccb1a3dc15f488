"""The parts of a look at what serves: the period's rows, the comparison, the snapshot, and who is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from policies.evidence import Sums
from policies.monitor import Group
from tasks.ports import Bundle, ModelVersion, Registry
from tasks.ports_monitor import Chosen, Comparer, Herald, Notice, Window, Windows


@task(name="live rows", retries=1, retry_delay_seconds=2, timeout_seconds=300, cache_policy=NO_CACHE)
def write_window(
    windows: Windows, version: ModelVersion, bundle: Bundle, chosen: Chosen, since: float, until: float, folder: Path
) -> Window:
    """The period's rows beside the reference rows, in files."""
    return windows.write(version, bundle, chosen, since, until, folder)


@task(name="compare", retries=1, retry_delay_seconds=2, timeout_seconds=1800, cache_policy=NO_CACHE)
def compare(
    comparer: Comparer, window: Window, name: str, columns: Sequence[str], method: str, permutations: int
) -> Group:
    """One group of columns against the reference."""
    whole, first, second = comparer.compare(window, columns, method, permutations)
    return Group(name, whole, (first, second))


@task(name="labels", retries=1, retry_delay_seconds=2, timeout_seconds=300, cache_policy=NO_CACHE)
def labelled(
    windows: Windows, version: ModelVersion, metric: str, since: float, until: float, wait: float
) -> tuple[Sums, int]:
    """The losses on the labels that came in the period, and how many answers have none."""
    return windows.losses(version, metric, since, until, wait)


@task(name="snapshot", retries=1, retry_delay_seconds=2, timeout_seconds=600, cache_policy=NO_CACHE)
def snapshot(comparer: Comparer, model: str, at: float, window: Window, page: Path) -> Path:
    """The detector's own report on the period, as a page and in its workspace."""
    return comparer.snapshot(model, at, window, page)


@task(name="keep", retries=2, retry_delay_seconds=[1, 4], timeout_seconds=180, cache_policy=NO_CACHE)
def keep(
    registry: Registry, version: ModelVersion, metrics: Mapping[str, float], tags: Mapping[str, str], pages: list[Path]
) -> str:
    """The look's figures and pages are with the version's run, its verdict on the version; returns a link."""
    registry.tag(version.model, version.version, tags)
    return registry.record(version, metrics, pages)


@task(name="show", timeout_seconds=60, cache_policy=NO_CACHE)
def show(key: str, said: str, table: list[dict[str, Any]]) -> None:
    """The look as a table in the UI."""
    create_table_artifact(table, key=key, description=said)


@task(name="tell", retries=2, retry_delay_seconds=[1, 4], timeout_seconds=60, cache_policy=NO_CACHE)
def tell(herald: Herald, notice: Notice) -> None:
    """An event that automations can hang on."""
    herald.tell(notice)


@task(name="start", retries=2, retry_delay_seconds=[1, 4], timeout_seconds=60, cache_policy=NO_CACHE)
def start(herald: Herald, key: str, deployment: str, parameters: Mapping[str, object]) -> str:
    """A run of a deployment; the name of the run."""
    return herald.start(key, deployment, parameters)
