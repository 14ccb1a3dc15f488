"""The rows that a version's servers sampled, read from their Arrow segments.

A segment is an Arrow IPC file, complete as soon as it has its name; the servers delete the oldest ones at any moment.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from tasks.ports import PortError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS_MAX = 50_000
_SPREAD_SEGMENTS_MAX = 2_000  # that are opened for rows of a whole period


class SampledRows:
    """The samples under an agent's home."""

    def __init__(self, agent_home: Path) -> None:
        self._folder = agent_home / "samples"

    def read(self, model: str, version: str, since: float, rows_max: int = ROWS_MAX, segments_max: int = 0) -> pa.Table:
        """The newest `rows_max` rows answered at or after `since` (POSIX seconds), oldest first.

        Of more than `segments_max` segments, if given, some are left out evenly: to open one is what takes time.

        Columns: request_id, row, time, in.*, prediction, status. Without any rows the table has no columns.
        Raises PortError if the folder cannot be read, or if a segment is no Arrow file.
        """
        tables: list[pa.Table] = []
        rows = 0
        segments = self._newest_first(model, version, since)
        apart = -(-len(segments) // segments_max) if segments_max and segments else 1
        for segment in segments[::apart]:
            table = _rows_since(segment, since)
            if table is None or table.num_rows == 0:
                continue
            tables.append(table)
            rows += table.num_rows
            if rows >= 2 * rows_max:  # replicas' segments overlap in time: some more, then the newest of them
                break
        if not tables:
            return pa.table({})
        merged = pa.concat_tables(tables, promote_options="default").sort_by("time")
        return merged.slice(max(0, merged.num_rows - rows_max))

    def spread(self, model: str, version: str, since: float, until: float, rows_max: int = ROWS_MAX) -> pa.Table:
        """Rows answered in [since, until), at most `rows_max` and spread over all of that time, oldest first: of too
        many segments and of too many requests, some are left out evenly. Otherwise as `read`."""
        import numpy as np

        kept: list[tuple[pa.Table, NDArray[np.int64]]] = []  # with each row's number of its request
        every, met = 1, 0
        segments = self._newest_first(model, version, since)
        for segment in segments[:: max(-(-len(segments) // _SPREAD_SEGMENTS_MAX), 1)]:
            table = _rows_since(segment, since)
            table = None if table is None else table.filter(pc.less(table["time"], until))
            if table is None or table.num_rows == 0:
                continue
            numbers = met + np.maximum(np.cumsum(table["row"].to_numpy() == 0) - 1, 0)
            met = int(numbers[-1]) + 1
            kept.append(_thinned(table, numbers, every))
            while sum(len(each) for _, each in kept) > rows_max and every < met:
                every *= 2
                kept = [_thinned(*each, every) for each in kept]
        if not kept:
            return pa.table({})
        merged = pa.concat_tables([table for table, _ in kept], promote_options="default").sort_by("time")
        return merged.slice(max(0, merged.num_rows - rows_max))

    def _newest_first(self, model: str, version: str, since: float) -> list[Path]:
        """The segments that can hold rows since then, by the time at which they were completed."""
        folder = self._folder / quote(model, safe="") / quote(version, safe="")
        dated: list[tuple[float, Path]] = []
        try:
            for path in folder.glob("*.arrow"):
                try:
                    completed = path.stat().st_mtime
                except FileNotFoundError:
                    continue  # deleted just now, as the oldest are
                if completed >= since - 1.0:  # file systems' clocks are coarser than ours
                    dated.append((completed, path))
        except OSError as exc:
            raise PortError(f"the samples in {folder} cannot be read: {exc.strerror or exc}") from exc
        return [path for _, path in sorted(dated, reverse=True)]


def _thinned(table: pa.Table, numbers: NDArray[np.int64], every: int) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of each so many-th request."""
    chosen = numbers % every == 0
    return (table, numbers) if chosen.all() else (table.filter(pa.array(chosen)), numbers[chosen])


def requests_of(table: pa.Table) -> NDArray[np.int64]:
    """Which request each row is of, by number, in the order of their first rows.

    Clients choose the ids of their requests: an id that stands at two times is of two requests.
    """
    import numpy as np

    ids = pc.dictionary_encode(table["request_id"].combine_chunks(), "encode").indices.to_numpy().astype(np.int64)
    times = np.unique(table["time"].to_numpy(), return_inverse=True)[1]
    _, first, number = np.unique(ids * (table.num_rows + 1) + times, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return np.asarray(order[number], np.int64)


def _rows_since(segment: Path, since: float) -> pa.Table | None:
    """The segment's rows since then; None if it has vanished meanwhile."""
    try:
        with pa.memory_map(str(segment)) as source:
            table = pa.ipc.open_file(source).read_all()
        return table.filter(pc.greater_equal(table["time"], since))
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, KeyError) as exc:
        raise PortError(f"the samples in {segment} cannot be read: {exc}") from exc
