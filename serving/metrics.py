"""What one model server counts, and its exposition as Prometheus text. Everything merges over replicas by sum.

Counting is a list index and an addition: it stands on the hot path. The text is made when somebody scrapes.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from policies.evidence import LATENCY_EDGES_MS, SCORE_EDGES
from serving.tensors import Array

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_ROWS_EDGES = tuple(float(2**power) for power in range(13))
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class Histogram:
    """Counts per bucket (`edges` are inclusive upper ones; one bucket more lies beyond the last) and the sum."""

    __slots__ = ("_array", "counts", "edges", "total")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.total = 0.0
        self._array = np.array(self.edges)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def add_many(self, values: Array) -> None:
        """Adds each value; one that is not finite counts in the last bucket, and not in the sum."""
        if len(values) < 8:
            for value in values.tolist():
                if value - value == 0.0:  # finite
                    self.add(value)
                else:
                    self.counts[-1] += 1
            return
        with np.errstate(all="ignore"):
            known, total = values, float(values.sum())
        if total - total != 0.0:  # one of them is not finite, or their sum is beyond the range
            finite = np.isfinite(values)
            known, total = np.where(finite, values, np.inf), float(values.sum(where=finite))
        for at, count in enumerate(np.bincount(np.searchsorted(self._array, known)).tolist()):
            self.counts[at] += count
        self.total += total


class Metrics:
    """The counters of one process. `epoch` names its start: a new one means that the counters began anew."""

    def __init__(self, model: str, version: str, epoch: str) -> None:
        self.epoch = epoch
        self._labels = f'model="{_escape(model)}",version="{_escape(version)}"'
        self.requests: dict[int, int] = {200: 0}
        self.errors = 0
        self.rows = 0
        self.runs = 0
        self.run_s = 0.0
        self.samples = 0
        self.samples_dropped = 0
        self.queued_rows = 0
        self.running_rows = 0
        self.ready = False
        self.latency_ms = Histogram(LATENCY_EDGES_MS)
        self.queue_ms = Histogram(LATENCY_EDGES_MS)
        self.batch_rows = Histogram(_ROWS_EDGES)
        self.prediction = Histogram(SCORE_EDGES)

    def answered(self, code: int, latency_ms: float) -> None:
        """One inference request was answered with status `code`, `latency_ms` after it had arrived whole."""
        self.requests[code] = self.requests.get(code, 0) + 1
        if code >= 500:
            self.errors += 1
        self.latency_ms.add(latency_ms)

    def text(self) -> bytes:
        """All of it in Prometheus' text format, version 0.0.4."""
        return "\n".join((*self._lines(), "")).encode()

    def _lines(self) -> Iterator[str]:
        labels = self._labels
        yield "# HELP lockgate_requests_total Inference requests answered, by HTTP status."
        yield "# TYPE lockgate_requests_total counter"
        for code, count in sorted(self.requests.items()):
            yield f'lockgate_requests_total{{{labels},code="{code}"}} {count}'
        for name, kind, text, value in (
            ("errors_total", "counter", "Inference requests answered with a 5xx status.", self.errors),
            ("rows_total", "counter", "Rows predicted.", self.rows),
            ("runs_total", "counter", "Runs of the model.", self.runs),
            ("run_seconds_total", "counter", "Time spent in runs of the model.", self.run_s),
            ("samples_total", "counter", "Rows kept as samples.", self.samples),
            (
                "samples_dropped_total",
                "counter",
                "Rows chosen but not kept: too many, or not writable.",
                self.samples_dropped,
            ),
            ("queue_rows", "gauge", "Rows waiting.", self.queued_rows),
            ("running_rows", "gauge", "Rows in the model now.", self.running_rows),
            ("ready", "gauge", "1 while new requests are welcome.", int(self.ready)),
        ):
            yield from (f"# HELP lockgate_{name} {text}", f"# TYPE lockgate_{name} {kind}")
            yield f"lockgate_{name}{{{labels}}} {value}"
        yield "# HELP lockgate_process_epoch Names this start of the process: with another one the counters begin anew."
        yield "# TYPE lockgate_process_epoch gauge"
        yield f'lockgate_process_epoch{{{labels},epoch="{self.epoch}"}} 1'
        yield from self._histogram("latency_ms", "From the whole request to its answer.", self.latency_ms)
        yield from self._histogram("queue_ms", "From the whole request to the run.", self.queue_ms)
        yield from self._histogram("batch_rows", "Rows per run.", self.batch_rows)
        yield from self._histogram("prediction", "The prediction of each row.", self.prediction)
        yield "# HELP process_resident_memory_bytes Resident memory."
        yield "# TYPE process_resident_memory_bytes gauge"
        yield f"process_resident_memory_bytes {resident_bytes()}"

    def _histogram(self, name: str, text: str, values: Histogram) -> Iterator[str]:
        yield f"# HELP lockgate_{name} {text}"
        yield f"# TYPE lockgate_{name} histogram"
        below = 0
        for edge, count in zip(values.edges, values.counts, strict=False):
            below += count
            yield f'lockgate_{name}_bucket{{{self._labels},le="{edge!r}"}} {below}'
        below += values.counts[-1]
        yield f'lockgate_{name}_bucket{{{self._labels},le="+Inf"}} {below}'
        yield f"lockgate_{name}_sum{{{self._labels}}} {values.total!r}"
        yield f"lockgate_{name}_count{{{self._labels}}} {below}"


def resident_bytes() -> int:
    """The resident memory of this process, 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
