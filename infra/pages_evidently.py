"""DriftPages: Evidently's own report on what both versions of a rollout answered, made in a worker process.

It is not the worker that compares for the drift gate: a page takes seconds, and no decision waits for one.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from infra.drift_evidently import EvidentlyDrift
from infra.samples_arrow import SampledRows
from tasks.ports import NotThere

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_MAX = 20_000  # read of each version; Evidently gets a thinned sample of them


class EvidentlyPages:
    """`tasks.ports.DriftPages` on what the servers of one agent sampled. `close` ends the worker."""

    def __init__(self, agent_home: Path) -> None:
        self._samples, self._drift, self._lock = SampledRows(agent_home), EvidentlyDrift(), threading.Lock()

    def close(self) -> None:
        """Ends the worker. Idempotent."""
        self._drift.close()

    def write(self, model: str, stable: str, candidate: str, since: float, until: float, path: Path) -> Path:
        first, second = (self._rows(model, version, since, until) for version in (stable, candidate))
        with self._lock:
            return self._drift.report_html(first, second, path)

    def _rows(self, model: str, version: str, since: float, until: float) -> pa.Table:
        table = _shown(self._samples.read(model, version, since, _ROWS_MAX), until)
        if not table.num_rows:
            raise NotThere(f"v{version} has no sampled rows of that time")
        return table


def _shown(table: pa.Table, until: float) -> pa.Table:
    """The answered rows up to then: inputs and predictions."""
    import pyarrow.compute as pc

    if not table.num_rows:
        return table
    kept = table.filter(pc.and_(pc.less_equal(table["time"], until), pc.less(table["status"], 400)))
    return kept.select([name for name in kept.column_names if name == "prediction" or name.startswith("in.")])
