"""Sampled rows: what went in and came out, as Arrow files that others pick up while the server goes on.

Whether a request is kept is decided by a hash of its id, so the stable version and the shadow keep the same rows.
The event loop only appends to a list; a thread writes. Nothing here delays or fails a request: what cannot be kept
is dropped and counted.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from serving.metrics import Metrics
from serving.model import Feeds
from serving.tensors import Array, Tensor

UNSAMPLED = "\0"  # the id of a request of which no sample may be kept
_WIDTH_MAX = 2048  # an input with more numbers per row (an image) is not kept: it would be one column each


@dataclass(frozen=True)
class SampleSettings:
    """Where and how much. `rows_max` and `bytes_max` bound what waits for the writer, once per `every_s` seconds."""

    folder: Path
    share: float = 1.0
    disk_bytes_max: int = 256 * 2**20
    rows_max: int = 20_000
    bytes_max: int = 64 * 2**20
    every_s: float = 0.8


@dataclass(frozen=True, slots=True)
class _Kept:
    at: float
    ids: Sequence[str]
    rows: Sequence[int]
    feeds: Feeds
    predictions: Array
    status: int


def chosen(request_id: str, share: float) -> bool:
    """Whether the rows of this request are kept: the same everywhere for the same id."""
    if request_id == UNSAMPLED:
        return False
    return share >= 1.0 or zlib.crc32(request_id.encode()) < share * 2**32


class Samples:
    """The sampler of one process. Files are DIR/<epoch>-<n>.arrow, complete when they appear under that name."""

    def __init__(self, settings: SampleSettings, inputs: Sequence[Tensor], epoch: str, metrics: Metrics) -> None:
        self._settings, self._epoch, self._metrics = settings, epoch, metrics
        self._inputs = [spec for spec in inputs if _columns(spec)]
        self._lock = threading.Lock()  # held for the exchange of a list, never over a file
        self._kept: list[_Kept] = []
        self._rows = 0
        self._bytes = 0
        self._written = 0
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="samples", daemon=True)
        self._complained = False

    def start(self) -> None:
        """Starts the writer. Raises OSError when the folder cannot be made."""
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self, wait_s: float = 5.0) -> None:
        """Writes what waits and ends the writer."""
        self._leave.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def keep(self, ids: Sequence[str], rows: Sequence[int], feeds: Feeds, predictions: Array, status: int) -> None:
        """Takes the chosen requests' rows, or drops and counts them where the bounds are reached."""
        share = self._settings.share
        if share >= 1.0 and UNSAMPLED not in ids:
            self._take(ids, rows, feeds, predictions, status)
            return
        start = 0
        for request_id, count in zip(ids, rows, strict=True):
            end = start + count
            if chosen(request_id, share):
                part = {name: values[start:end] for name, values in feeds.items() if values.ndim}
                self._take((request_id,), (count,), part, predictions[start:end], status)
            start = end

    def _take(self, ids: Sequence[str], rows: Sequence[int], feeds: Feeds, predictions: Array, status: int) -> None:
        count = len(predictions)
        if not count:
            return
        settings = self._settings
        size = sum(values.nbytes for values in feeds.values())
        with self._lock:
            if self._rows + count > settings.rows_max or self._bytes + size > settings.bytes_max:
                self._metrics.samples_dropped += count
                return
            self._rows += count
            self._bytes += size
            self._kept.append(_Kept(time(), ids, rows, feeds, predictions, status))

    def _write_on(self) -> None:
        import pyarrow as pa  # noqa: F401 - here and early: its price is paid beside the requests, not before them

        while not self._leave.wait(self._settings.every_s):
            self.write()
        self.write()

    def write(self) -> None:
        """Writes what was taken so far as one file. A failure drops the rows, counts them and is said once."""
        with self._lock:
            kept, self._kept = self._kept, []
            self._rows = self._bytes = 0
        if not kept:
            return
        count = sum(len(part.predictions) for part in kept)
        try:
            self._write_file(kept)
            self._metrics.samples += count
            self._delete_oldest()
            self._complained = False
        except Exception as exc:  # noqa: BLE001 - sampling must never take the server down
            self._metrics.samples_dropped += count
            if not self._complained:
                sys.stderr.write(f"samples are not kept: {type(exc).__name__}: {exc}\n")
                self._complained = True

    def _write_file(self, kept: list[_Kept]) -> None:
        import pyarrow as pa

        table = pa.table(_table(kept, self._inputs))
        final = self._settings.folder / f"{self._epoch}-{self._written:09d}.arrow"
        aside = final.with_suffix(".part")
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        aside.rename(final)
        self._written += 1

    def _delete_oldest(self) -> None:
        """Deletes the oldest files of the folder, other processes' too, down to the bound."""
        files = []
        for path in self._settings.folder.glob("*.arrow"):
            try:
                state = path.stat()
            except FileNotFoundError:  # another replica deleted it first
                continue
            files.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._settings.disk_bytes_max:
                return
            path.unlink(missing_ok=True)
            total -= size


def _columns(spec: Tensor) -> int:
    """How many columns the input has in a sample; 0: it is not kept (its width is free, or very large)."""
    width = 1
    for length in spec.shape[1:]:
        width *= length if isinstance(length, int) else 0
    return width if width <= _WIDTH_MAX else 0


def _table(kept: list[_Kept], inputs: Sequence[Tensor]) -> dict[str, Any]:
    import pyarrow as pa

    counts = [len(part.predictions) for part in kept]
    ids: list[str] = []
    rows: list[Array] = []
    for part in kept:
        for request_id, count in zip(part.ids, part.rows, strict=True):
            ids.extend([request_id] * count)
            rows.append(np.arange(count, dtype=np.int32))
    columns: dict[str, Any] = {
        "request_id": pa.array(ids, pa.string()),
        "row": pa.array(np.concatenate(rows)),
        "time": pa.array(np.repeat([part.at for part in kept], counts)),
    }
    for spec in inputs:
        if any(part.feeds[spec.name].size % len(part.predictions) for part in kept):
            continue  # a model without a row axis in this input: nothing to lay beside the predictions
        values = np.concatenate([part.feeds[spec.name].reshape(len(part.predictions), -1) for part in kept])
        if len(spec.shape) < 2:
            columns[f"in.{spec.name}"] = pa.array(values[:, 0])
            continue
        for at, column in enumerate(np.ascontiguousarray(values.T)):
            columns[f"in.{spec.name}.{at}"] = pa.array(column)
    columns["prediction"] = pa.array(np.concatenate([part.predictions for part in kept]))
    columns["status"] = pa.array(np.repeat([part.status for part in kept], counts).astype(np.int16))
    return columns
