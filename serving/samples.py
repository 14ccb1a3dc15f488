"""Sampled rows: what went in and came out, as Arrow files that others pick up while the server goes on.

Whether a request is kept is decided by a hash of its id, so the stable version and the shadow keep the same rows.
The event loop copies the rows into a segment of fixed size; a thread writes it while another one fills. Nothing here
delays or fails a request: what cannot be kept is dropped and counted.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from serving.log import complain
from serving.metrics import Metrics
from serving.model import Feeds
from serving.tensors import Array, Tensor

_CHECK_FILES = 32  # small files are many: to look at all of them after each one would cost more than to write them
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


class _Segment:
    """Room for so many rows, column by column; what is the same for all rows of a batch stands once per batch."""

    def __init__(self, inputs: Sequence[Tensor], room: int) -> None:
        self.room = room
        # Memory that is never written to costs nothing: an idle server's segments are empty pages.
        self.inputs = {spec.name: np.empty((room, _columns(spec)), spec.datatype.numpy) for spec in inputs}
        self.predictions = np.empty(room)
        self.clear()

    def clear(self) -> None:
        """Forgets the rows."""
        self.filled = 0
        self.text_bytes = 0  # that the ids and the rows' strings hold, beyond the columns
        self.ids: list[str] = []
        self.rows: list[int] = []  # per id
        self.counts: list[int] = []  # rows per batch, of which these are the time and the status:
        self.times: list[float] = []
        self.statuses: list[int] = []
        self.odd: set[str] = set()  # inputs without a row axis in some batch: nothing to lay beside the predictions
        for values in self.inputs.values():
            if values.dtype == object:
                values[:] = None

    def add(
        self, ids: Sequence[str], rows: Sequence[int], feeds: Mapping[str, Array], predictions: Array, status: int
    ) -> None:
        """Copies the rows, for which there is room."""
        count = len(predictions)
        start, end = self.filled, self.filled + count
        self.predictions[start:end] = predictions
        for name, kept in self.inputs.items():
            values = feeds.get(name)
            if values is None or values.size != count * kept.shape[1]:
                self.odd.add(name)
            else:
                kept[start:end] = values.reshape(count, -1)
        self.ids += ids
        self.rows += rows
        self.counts.append(count)
        self.times.append(time())
        self.statuses.append(status)
        self.filled = end


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
        row_bytes = sum(_columns(spec) * spec.datatype.numpy.itemsize for spec in self._inputs)
        self._texts = [spec.name for spec in self._inputs if spec.datatype.numpy.kind == "O"]
        self._segment_bytes = settings.bytes_max // 2  # one is filled while the other is written
        room = min(settings.rows_max, self._segment_bytes // max(1, row_bytes))
        self._lock = threading.Lock()  # held while one batch is copied or the segments change, never over a file
        self._filling, self._spare = _Segment(self._inputs, room), _Segment(self._inputs, room)
        self._written = 0
        self._unchecked_files, self._unchecked_bytes = _CHECK_FILES, 0  # since the folder was last looked at
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
        text_bytes = sum(map(len, ids))
        text_bytes += sum(len(value) for name in self._texts if name in feeds for value in feeds[name].flat)
        with self._lock:
            segment = self._filling
            if segment.filled + count > segment.room or segment.text_bytes + text_bytes > self._segment_bytes:
                self._metrics.samples_dropped += count
            else:
                segment.text_bytes += text_bytes
                segment.add(ids, rows, feeds, predictions, status)

    def _write_on(self) -> None:
        import pyarrow as pa  # noqa: F401 - here and early: its price is paid beside the requests, not before them

        while not self._leave.wait(self._settings.every_s):
            self.write()
        self.write()

    def write(self) -> None:
        """Writes what was taken so far as one file. A failure drops the rows, counts them and is said once."""
        with self._lock:
            full, self._filling = self._filling, self._spare
        self._spare = full
        count = full.filled
        if not count:
            return
        try:
            size = self._write_file(full)
            self._metrics.samples += count
            self._unchecked_files += 1
            self._unchecked_bytes += size
            if self._unchecked_files >= _CHECK_FILES or self._unchecked_bytes * 16 >= self._settings.disk_bytes_max:
                self._unchecked_files = self._unchecked_bytes = 0
                self._delete_oldest()
            self._complained = False
        except Exception as exc:  # noqa: BLE001 - sampling must never take the server down
            self._metrics.samples_dropped += count
            if not self._complained:
                complain(f"samples are not kept: {type(exc).__name__}: {exc}")
                self._complained = True
        full.clear()

    def _write_file(self, segment: _Segment) -> int:
        import pyarrow as pa

        table = pa.table(_table(segment, self._inputs))
        final = self._settings.folder / f"{self._epoch}-{self._written:09d}.arrow"
        aside = final.with_suffix(".part")
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        size = aside.stat().st_size
        aside.rename(final)
        self._written += 1
        return size

    def _delete_oldest(self) -> None:
        """Deletes the oldest files of the folder, other processes' too, down to the bound. What a killed process left
        half written is among them."""
        files = []
        for path in self._settings.folder.iterdir():
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


def _table(segment: _Segment, inputs: Sequence[Tensor]) -> dict[str, Any]:
    import pyarrow as pa

    count, rows = segment.filled, np.array(segment.rows)
    first = np.cumsum(rows) - rows  # of each id
    columns: dict[str, Any] = {
        "request_id": pa.array(segment.ids, pa.string()).take(pa.array(np.repeat(np.arange(len(rows)), rows))),
        "row": pa.array((np.arange(count) - np.repeat(first, rows)).astype(np.int32)),
        "time": pa.array(np.repeat(segment.times, segment.counts)),
    }
    for spec in inputs:
        if spec.name in segment.odd:
            continue
        values = segment.inputs[spec.name][:count]
        if len(spec.shape) < 2:
            columns[f"in.{spec.name}"] = pa.array(values[:, 0])
            continue
        for at, column in enumerate(np.ascontiguousarray(values.T)):
            columns[f"in.{spec.name}.{at}"] = pa.array(column)
    columns["prediction"] = pa.array(segment.predictions[:count])
    columns["status"] = pa.array(np.repeat(segment.statuses, segment.counts).astype(np.int16))
    return columns
