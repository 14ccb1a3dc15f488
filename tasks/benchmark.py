"""How fast is it, on the hardware where it will run, beside the champion?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.ports import Endpoint, Probe, Speed


@task(name="benchmark", retries=1, retry_delay_seconds=2, timeout_seconds=900, cache_policy=NO_CACHE)
def race(probe: Probe, endpoints: Sequence[Endpoint], rows: Path, label: str, duration_s: float) -> list[Speed]:
    """Each endpoint's speed on the same rows, interleaved in one run, so that the machine's mood hits both."""
    return probe.race(endpoints, rows, label, duration_s)
