"""Labels that came later, by request: Arrow segments under the platform's home.

A segment holds `request_id`, `row` (which of the request's rows; 0 by default), `label` and `came` (POSIX seconds);
its name is its number, and it is complete as soon as it has that name. Within a segment a (request_id, row) stands
once; of several segments the later one wins. The oldest segments beyond `ROWS_MAX` rows are deleted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from infra import rows
from tasks.ports import BadInput, PortError

ROWS_MAX = 1_000_000  # of one model; at some 50 bytes each
_ROW_MAX = 2**31 - 1
_TRIES = 100  # writers at the same moment take turns for a number


class LabelStore:
    """The labels under an agent's home. Any number of writers and readers may use it at the same time."""

    def __init__(self, agent_home: Path) -> None:
        self._folder = agent_home / "labels"

    def add(self, model: str, path: Path) -> int:
        """Stores the labels of a CSV or Parquet file with the columns request_id, label and, if wanted, row.

        Returns how many. Raises BadInput that names what is wrong with the file, and then stores nothing; PortError if
        they cannot be written.
        """
        table = _labels_in(path)
        folder = self._of(model)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{os.getpid()}-{time.monotonic_ns()}.part"
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            _name(part, folder)
            self._forget(folder)
        except OSError as exc:
            raise PortError(f"labels cannot be written to {folder}: {exc.strerror or exc}") from exc
        return int(table.num_rows)

    def after(self, model: str, number: int) -> Iterator[tuple[int, Any]]:
        """The segments after the one with the number, oldest first, as (number, table). Raises PortError."""
        folder = self._of(model)
        for path in sorted(folder.glob("[0-9]*.arrow")):
            if int(path.stem) <= number:
                continue
            try:
                with pa.memory_map(str(path)) as source:
                    yield int(path.stem), pa.ipc.open_file(source).read_all()
            except FileNotFoundError:
                continue  # deleted just now, as the oldest are
            except (pa.ArrowException, OSError) as exc:
                raise PortError(f"the labels in {path} cannot be read: {exc}") from exc

    def _of(self, model: str) -> Path:
        return self._folder / quote(model, safe="")

    def _forget(self, folder: Path) -> None:
        kept = 0
        for path in sorted(folder.glob("[0-9]*.arrow"), reverse=True):
            try:
                with pa.memory_map(str(path)) as source:
                    file = pa.ipc.open_file(source)
                    count = sum(file.get_batch(index).num_rows for index in range(file.num_record_batches))
            except (FileNotFoundError, pa.ArrowException):
                continue
            if kept and kept + count > ROWS_MAX:
                path.unlink(missing_ok=True)
            kept += count


def _name(part: Path, folder: Path) -> None:
    """Gives the file the next free number; a link, unlike a rename, fails where another writer was faster."""
    for _ in range(_TRIES):
        newest = max((int(path.stem) for path in folder.glob("[0-9]*.arrow")), default=0)
        try:
            os.link(part, folder / f"{newest + 1:012d}.arrow")
        except FileExistsError:
            continue
        part.unlink()
        return
    part.unlink()
    raise OSError(f"no free number after {_TRIES} tries")


def _labels_in(path: Path) -> pa.Table:
    table = rows.read(path, text=("request_id",))
    ids = rows.values(table, "request_id", path)
    try:
        ids = ids.cast(pa.string())
    except pa.ArrowException as exc:
        raise BadInput(f"{path}: column 'request_id' is no text: {rows.first_line(exc)}") from exc
    labels = rows.numbers(table, "label", path)
    bad = next((value for value in labels.tolist() if not 0.0 <= value <= 1.0), None)
    if bad is not None:
        raise BadInput(f"{path}: column 'label' holds {bad:g}; a label is 0, 1, or between (a missing one is left out)")
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        raise BadInput(f"{path}: column 'request_id' is empty in some row; each label names its request")
    count = table.num_rows
    if count > ROWS_MAX:
        raise BadInput(f"{path}: has {count:,} rows; {ROWS_MAX:,} labels are kept, so give the newest of them")
    number = rows.numbers(table, "row", path) if "row" in table.column_names else [0.0] * count
    if not all(0 <= value <= _ROW_MAX and value == int(value) for value in number):
        raise BadInput(f"{path}: column 'row' must hold whole numbers from 0 to {_ROW_MAX}")
    made = pa.table(
        {
            "request_id": ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids,
            "row": pa.array([int(value) for value in number], pa.int32()),
            "label": pa.array(labels, pa.float64()),
            "at": pa.array(range(count), pa.int64()),
        }
    )
    last = made.group_by(["request_id", "row"]).aggregate([("at", "max")])["at_max"]
    kept = made.take(last.combine_chunks().sort())
    came = pa.array([time.time()] * kept.num_rows, pa.float64())
    return kept.drop_columns(["at"]).append_column("came", came)
