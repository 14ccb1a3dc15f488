"""Two windows of sampled rows compared by Evidently's statistics, in a process of their own.

Evidently takes 5 to 15 s to import and 300 MB, so its only importer is a worker process that this adapter starts when
it is first needed (`warm` starts it earlier), and ends with `close`. Evidently gives the distance; what that distance
would be by chance comes from a permutation test of the pooled requests (the rows of one resemble each other), since
Evidently's own default tests raise an alarm on equal windows too often or see too little, depending on the number of
rows. Missing values, which Evidently drops silently, are counted beside it.

A text column is compared as categories, for which `psi`, `jensenshannon` and `hellinger` are defined.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infra.drift_worker import Columns
from policies.evidence import Drift, rows_max
from tasks.ports import BadInput, NotThere, PortError

if TYPE_CHECKING:
    import pyarrow as pa

METHODS = ("wasserstein", "ks", "psi", "jensenshannon", "hellinger")
_FOR_TEXT = ("psi", "jensenshannon", "hellinger")
_REPORT_ROWS = 2000
_REPORT_TIMEOUT_S = 180.0
_POLL_S = 0.01
_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class _Asked:
    """A question to the worker, the time (monotonic) until which it is waited for, and its (error, answer)."""

    number: int
    limit: float
    answer: tuple[str | None, Any] | None = None


class EvidentlyDrift:
    """Compares windows. Safe to use from several threads, which share one worker. `close` ends it."""

    def __init__(
        self, permutations: int = 1999, rows_max: int | None = None, wait_s: float = 2.0, timeout_s: float = 60.0
    ) -> None:
        """`rows_max` of each window are compared (by default as many as `policies.evidence.rows_max` says), evenly
        thinned by whole requests; one comparison may take `timeout_s` at most, and those that were asked for before it
        as long each."""
        self._permutations = permutations
        self._rows_max = rows_max
        self._wait_s = wait_s
        self._timeout_s = timeout_s
        self._worker: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[object, _Asked] = {}
        self._lock = threading.Lock()  # never held while the worker is waited for

    def warm(self) -> None:
        """Starts the worker, without waiting for it."""
        with self._lock:
            self._connection()

    def close(self) -> None:
        """Ends the worker. Idempotent."""
        with self._lock:
            self._end()

    def __enter__(self) -> EvidentlyDrift:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def compare(
        self,
        reference: pa.Table,
        current: pa.Table,
        columns: Sequence[str],
        method: str = "wasserstein",
        of: str = "",
        permutations: int | None = None,
    ) -> Drift:
        """The windows' distances column by column, with the p-value of the largest under permutation.

        With `of`, the name of what is compared, a call waits `wait_s` at most: it raises NotThere while the comparison
        is under way, and the next call with the same `of` brings its result. Without, it waits until it is done.
        Rows with a `request_id` and `time` in common are one request's; without those columns each is its own.
        Rows whose `status` is an HTTP error are left out, where the tables have that column.
        Raises BadInput for a column or method that cannot be compared, NotThere for a window without rows, PortError
        when there is nothing but missing values to compare, or the worker fails.
        """
        if method not in METHODS:
            raise BadInput(f"method '{method}' is not known; it is one of {', '.join(METHODS)}")
        what = _name(of, columns, method) if of else object()
        asked = self._asked.get(what)
        if asked is None:
            windows = [
                _window(table, columns, method, self._rows_max or rows_max(method), name)
                for table, name in ((reference, "stable version's"), (current, "candidate's"))
            ]
            asked = self._submit("compare", (*windows, method, permutations or self._permutations), what)
        answer = self._receive(what, asked, self._wait_s if of else self._timeout_s, patient=bool(of))
        assert isinstance(answer, Drift)
        return answer

    def under_way(self, of: str, columns: Sequence[str], method: str) -> bool:
        """Whether such a comparison has been asked for, so that the next call of `compare` needs no windows."""
        return _name(of, columns, method) in self._asked

    def report_html(
        self,
        reference: pa.Table,
        current: pa.Table,
        path: Path,
        workspace: Path | None = None,
        project: str = "",
        at: float = 0.0,
    ) -> Path:
        """Evidently's own report on the columns that both tables have, as one HTML file at `path`; also as a run of the
        time `at` (POSIX seconds) in the project of an Evidently workspace, if one is given.

        Up to 2,000 rows of each. Raises NotThere for a window without rows, PortError when the worker fails.
        """
        names = [name for name in reference.column_names if name in current.column_names]
        if not reference.num_rows or not current.num_rows or not names:
            raise NotThere("no rows to report on")
        windows = [_window(table, names, "psi", _REPORT_ROWS, "report's", smallest=1) for table in (reference, current)]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (str(workspace), project, at) if workspace is not None else None
        what = object()
        self._receive(what, self._submit("report", (*windows, str(path), kept), what), _REPORT_TIMEOUT_S, patient=False)
        return path

    # ------------------------------------------------------------ the worker

    def _submit(self, kind: str, body: tuple[Any, ...], what: object) -> _Asked:
        with self._lock:
            self._take_in()
            now = time.monotonic()
            over = {each: asked for each, asked in self._asked.items() if now >= asked.limit}
            if any(asked.answer is None for asked in over.values()):
                self._end()
            for each in over:  # whoever asked has gone, or asks again
                del self._asked[each]
            connection, number = self._connection(), next(self._numbers)
            try:
                connection.send((number, kind, body))
            except OSError as exc:
                self._end()
                raise PortError(f"the drift worker ended: {exc}") from exc
            waiting = 1 + sum(asked.answer is None for asked in self._asked.values())
            made = self._asked[what] = _Asked(number, now + waiting * self._timeout_s)
            return made

    def _connection(self) -> Connection:
        if self._worker is not None and self._worker[0].poll() is not None:
            self._end()
        if self._worker is None:
            ours, theirs = Pipe()
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-m", "infra.drift_worker", str(descriptor)],
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(_ROOT), "DO_NOT_TRACK": "1", "MPLBACKEND": "Agg"},
                start_new_session=True,  # a Ctrl-C is for whoever asked; this process ends with its pipe
            )
            theirs.close()
            self._worker = process, ours
        return self._worker[1]

    def _end(self) -> None:
        """Ends the worker; whoever waits for it is told, and asks the next one."""
        for asked in self._asked.values():
            asked.answer = asked.answer or ("the drift worker ended in the middle of a comparison", None)
        if self._worker is not None:
            process, connection = self._worker
            self._worker = None
            connection.close()
            process.kill()
            process.wait()

    def _receive(self, what: object, asked: _Asked, wait_s: float, patient: bool) -> Any:
        """The answer. `patient`: not being ready yet is NotThere, until the time-out is over."""
        until = time.monotonic() + wait_s
        while True:
            with self._lock:
                self._take_in()
                if asked.answer is not None:
                    self._asked.pop(what, None)
                    error, answer = asked.answer
                    if error is not None:
                        raise PortError(error)
                    return answer
            if time.monotonic() >= until:
                break
            time.sleep(_POLL_S)
        if patient and time.monotonic() < asked.limit:
            raise NotThere("the windows are being compared")
        with self._lock:
            self._asked.pop(what, None)
            self._end()
        raise PortError(f"no comparison after {self._timeout_s:g} s; the drift worker was ended")

    def _take_in(self) -> None:
        """The answers that have come, each for whoever asked."""
        if self._worker is None:
            return
        try:
            while self._worker[1].poll():
                number, error, answer = self._worker[1].recv()
                for asked in self._asked.values():
                    if asked.number == number:
                        asked.answer = f"Evidently could not compare: {error}" if error else None, answer
        except (EOFError, OSError):
            self._end()


def _name(of: str, columns: Sequence[str], method: str) -> object:
    return of, tuple(columns), method


def _window(
    table: pa.Table, columns: Sequence[str], method: str, rows_max: int, owner: str, smallest: int = 2
) -> Columns:
    """The table's columns as arrays: numbers as float64 with NaN for missing, text as objects with None."""
    import pyarrow.compute as pc

    if "status" in table.column_names:
        table = table.filter(pc.less(table["status"], 400))
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise BadInput(f"the {owner} rows have no column '{missing[0]}'; they have {', '.join(table.column_names)}")
    if table.num_rows < smallest:
        raise NotThere(f"the {owner} window has {table.num_rows} rows")
    requests, newest = _requests(table)
    if table.num_rows > rows_max:
        count = int(requests.max()) + 1
        kept = np.linspace(0, count - 1, max(count * rows_max // table.num_rows, 1)).astype(np.int64)
        rows = np.flatnonzero(np.isin(requests, kept))
        if len(rows) > rows_max:  # the requests' sizes differ
            rows = rows[np.linspace(0, len(rows) - 1, rows_max).astype(np.int64)]
        table, requests = table.take(rows), np.unique(requests[rows], return_inverse=True)[1]
    values = {name: _array(table[name], name, method) for name in columns}
    own = int(requests.max()) + 1 == table.num_rows
    return Columns(values, table.num_rows, None if own else requests, newest)


def _requests(table: pa.Table) -> tuple[NDArray[np.int64], float | None]:
    """Which request each row is of, by number, and when the newest was answered."""
    import pyarrow as pa

    from infra.samples_arrow import requests_of

    if not {"request_id", "time"} <= set(table.column_names) or not pa.types.is_floating(table["time"].type):
        return np.arange(table.num_rows), None
    return requests_of(table), float(table["time"].to_numpy().max())


def _array(column: pa.ChunkedArray, name: str, method: str) -> NDArray[Any]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        values: NDArray[Any] = column.cast(pa.float64()).to_numpy()
        return np.where(np.isfinite(values), values, np.nan)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        raise BadInput(f"column '{name}' holds {kind}, which is neither numbers nor text")
    if method not in _FOR_TEXT:
        raise BadInput(f"column '{name}' is text; compare it by {', '.join(_FOR_TEXT)} instead of {method}")
    return np.array(column.to_pylist(), dtype=object)
