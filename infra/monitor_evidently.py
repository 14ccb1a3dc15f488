"""Comparer: a period's rows against the reference by Evidently's statistics, half by half, in its worker process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra import rows
from infra.drift_evidently import EvidentlyDrift
from policies.evidence import Drift
from tasks.ports_monitor import Window

if TYPE_CHECKING:
    import pyarrow as pa


class EvidentlyMonitor:
    """`tasks.ports_monitor.Comparer`; reports are also kept in the Evidently workspace in the folder `workspace`."""

    def __init__(self, drift: EvidentlyDrift, workspace: Path) -> None:
        self._drift, self._workspace = drift, workspace

    def compare(
        self, window: Window, columns: Sequence[str], method: str, permutations: int
    ) -> tuple[Drift, Drift, Drift]:
        reference, live = rows.read(window.reference), rows.read(window.live)
        whole = self._drift.compare(reference, live, columns, method, permutations=1)
        first, second = (
            self._drift.compare(one, other, columns, method, permutations=permutations)
            for one, other in zip(
                _halves(reference, window.reference_half), _halves(live, window.live_half), strict=True
            )
        )
        return whole, first, second

    def snapshot(self, model: str, at: float, window: Window, page: Path) -> Path:
        reference, live = rows.read(window.reference), rows.read(window.live)
        return self._drift.report_html(reference, live, page, self._workspace, model, at)


def _halves(table: pa.Table, first: int) -> tuple[pa.Table, pa.Table]:
    return table.slice(0, first), table.slice(first)
