"""A fake Probe: versions answer and run as they were told to; no server, no rows read.

`answers[version]` are its predictions (NaN for a row that fails), `speeds[version]` its speed. A version in `absent`
raises PortError, as a server that is not there does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tasks.ports import Answers, BadInput, Endpoint, PortError, Speed

FAST = Speed(
    requests=1000, failed=0, latency_ms=(1.0,) * 500 + (1.5,) * 500, throughput_rps=900.0, memory_mb=80.0, load_s=0.2
)


class FakeProbe:
    """`tasks.ports.Probe` by rote."""

    def __init__(self) -> None:
        self.answers: dict[str, Sequence[float]] = {}
        self.speeds: dict[str, Speed] = {}
        self.absent: set[str] = set()

    def ask(self, endpoint: Endpoint, rows: Path, label: str | None, limit: int) -> Answers:
        self._there(endpoint, rows)
        predictions = tuple(self.answers.get(endpoint.version, ()))[:limit]
        failures = tuple(f"row {i}: 500 told to fail" for i, value in enumerate(predictions) if math.isnan(value))
        return Answers(predictions, failures)

    def race(self, endpoints: Sequence[Endpoint], rows: Path, label: str | None, duration_s: float) -> list[Speed]:
        for endpoint in endpoints:
            self._there(endpoint, rows)
        return [self.speeds.get(endpoint.version, FAST) for endpoint in endpoints]

    def _there(self, endpoint: Endpoint, rows: Path) -> None:
        if endpoint.version in self.absent:
            raise PortError(f"'{endpoint.model}' version {endpoint.version} at {endpoint.url} is not there")
        if not rows.is_file():
            raise BadInput(f"{rows}: no such file")
