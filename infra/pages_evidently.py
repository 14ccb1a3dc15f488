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
        tables = [_shown(self._samples.read(model, each, since, _ROWS_MAX), until) for each in (stable, candidate)]
        for version, table in zip((stable, candidate), tables, strict=True):
            if not table.num_rows:
                raise NotThere(f"v{version} has no sampled rows of that time")
        with self._lock:
            return self._drift.report_html(*tables, path)


def _shown(table: pa.Table, until: float) -> pa.Table:
    """The answered rows up to then: inputs and predictions."""
    import pyarrow.compute as pc

    if not table.num_rows:
        return table
    kept = table.filter(pc.and_(pc.less_equal(table["time"], until), pc.less(table["status"], 400)))
    return kept.select([name for name in kept.column_names if name == "prediction" or name.startswith("in.")])
