"""Micro-batching without waiting: what one turn of the event loop brought in runs as one batch.

An idle server answers the first request at once; under load batches grow by themselves, because requests arrive while
the model runs. No timer is involved. A fast, steady model runs on the event loop itself; one that is slow, or whose
time depends on the values, runs in a worker thread, so that health, metrics and admission stay answered.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter, thread_time
from typing import Protocol

import numpy as np

from serving.errors import Busy, Late, ModelFailed, Refused
from serving.metrics import Metrics
from serving.model import Feeds, Model
from serving.tensors import Array

Outcome = list[Array] | Refused

_OVERRUN = 10.0  # a run on the loop that took this many times the limit sends the model to the worker thread ...
_DISTRUST_S = 60.0  # ... for so long
_SLOWER = 3.0  # a run may take so many times as long as its rows have taken in the runs before
_UNKNOWN_ROW_S = 1.0  # what a row may take before any has run
_LOOKAHEAD = 256  # jobs of another shape that are passed over in search of some that fit the batch


@dataclass(frozen=True)
class Limits:
    """Bounds of the queue and of one run.

    `inline_ms`: a run expected to take longer leaves the event loop for the worker thread.
    `run_s`: a run that lasts longer than it may be expected to by so much hangs; every route has given up long before.
    """

    queue_rows: int = 4096
    queue_bytes: int = 256 * 2**20
    batch_rows: int = 1024
    inline_ms: float = 5.0
    run_s: float = 60.0


class Job:
    """One request in the queue. `finish` is called exactly once, on the event loop."""

    __slots__ = ("bytes", "deadline", "feeds", "finish", "id", "key", "queued_at", "rows")

    def __init__(
        self, job_id: str, feeds: Feeds, rows: int, size: int, deadline: float | None, finish: Callable[[Outcome], None]
    ) -> None:
        self.id = job_id
        self.feeds = feeds
        self.rows = rows
        self.bytes = size
        self.deadline = deadline  # perf_counter seconds
        self.finish = finish
        self.queued_at = 0.0
        self.key: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class _Ran:
    """What a run gave: the joined inputs, the joined outputs (None if the jobs did not run as one), each job's outcome.

    `wall_s` and `cpu_s`: how long it took. The latter decides where the next one runs: a busy machine is no slow model.
    """

    feeds: Feeds
    outputs: list[Array] | None
    outcomes: list[Outcome]
    start: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Keeper(Protocol):
    """Who is shown every row that ran, for sampling. Must neither raise nor wait."""

    def keep(self, ids: Sequence[str], rows: Sequence[int], feeds: Feeds, predictions: Array, status: int) -> None:
        """`ids` and `rows` per job, in the order in which their rows stand in `feeds` and `predictions`."""


@dataclass(frozen=True)
class Predictor:
    """Which number of the outputs is *the* prediction: `column` of output `at`; None when no output is numeric."""

    at: int | None
    column: int = -1

    def of(self, outputs: Sequence[Array], rows: int) -> Array:
        """The prediction of each row, NaN where there is none."""
        if self.at is not None:
            values = outputs[self.at]
            if values.ndim and values.shape[0] == rows and values.size:
                flat = values.reshape(rows, -1)
                if -flat.shape[1] <= self.column < flat.shape[1]:
                    return flat[:, self.column].astype(np.float64)
        return np.full(rows, np.nan)


class Batcher:
    """The queue before the model, and its runs."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        model: Model,
        limits: Limits,
        metrics: Metrics,
        predictor: Predictor,
        keeper: Keeper | None = None,
    ) -> None:
        self._loop, self._model, self._limits, self._metrics = loop, model, limits, metrics
        self._predictor, self._keeper = predictor, keeper
        self._names = [spec.name for spec in model.signature.inputs]
        self._free_shapes = any(not isinstance(size, int) for spec in model.signature.inputs for size in spec.shape[1:])
        self._queue: deque[Job] = deque()
        self._rows = 0
        self._bytes = 0
        self._row_s = model.row_s
        self._distrusted_until = 0.0
        self._busy = False  # a turn is scheduled, or the worker is running
        self._hangs_at: float | None = None  # when what runs will have lasted too long
        self._work: SimpleQueue[list[Job] | None] | None = None

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._queue and not self._busy

    @property
    def hangs(self) -> bool:
        """What runs has lasted for longer than it may: the model may never return."""
        hangs_at = self._hangs_at
        return hangs_at is not None and perf_counter() > hangs_at

    def _begins(self, rows: int) -> None:
        expected_s = rows * (_UNKNOWN_ROW_S if self._row_s is None else self._row_s)
        self._hangs_at = perf_counter() + self._limits.run_s + _SLOWER * expected_s

    def submit(self, job: Job, at_once: bool = False) -> None:
        """Queues the job for the next turn of the loop, or for this one, where nothing else can come to join it.

        Raises Busy when the queue is full; then `finish` is not called.
        """
        if self._queue and self._rows + job.rows > self._limits.queue_rows:
            raise Busy("rows", self._limits.queue_rows)
        if self._queue and self._bytes + job.bytes > self._limits.queue_bytes:
            raise Busy("bytes", self._limits.queue_bytes)
        job.queued_at = perf_counter()
        if self._free_shapes:
            job.key = tuple(job.feeds[name].shape[1:] for name in self._names)
        self._queue.append(job)
        self._bytes += job.bytes
        self._rows += job.rows
        self._metrics.queued_rows = self._rows
        if not self._busy:
            self._busy = True
            if at_once:
                self._turn()
            else:
                self._loop.call_soon(self._turn)

    def expire(self) -> None:
        """Answers the jobs whose deadline passed while they wait; to be called now and then."""
        now = perf_counter()
        late = [job for job in self._queue if job.deadline is not None and job.deadline < now]
        for job in late:
            self._queue.remove(job)
            self._forget(job)
            job.finish(Late((now - job.queued_at) * 1000))

    def close(self) -> None:
        """Lets the worker thread end after what it is running."""
        if self._work is not None:
            self._work.put(None)

    def _forget(self, job: Job) -> None:
        self._bytes -= job.bytes
        self._rows -= job.rows
        self._metrics.queued_rows = self._rows

    def _turn(self) -> None:
        batch = self._take()
        if not batch:
            self._busy = False
            return
        self._metrics.running_rows = sum(job.rows for job in batch)
        if self._inline(self._metrics.running_rows):
            self._finish(batch, self._run(batch), inline=True)
        else:
            self._begins(self._metrics.running_rows)
            self._worker().put(batch)

    def _take(self) -> list[Job]:
        """The oldest job and those that may run with it, up to the cap. The late are answered on the way."""
        batch: list[Job] = []
        passed: list[Job] = []
        rows, now, alone = 0, perf_counter(), not self._model.signature.batch
        while self._queue and len(passed) < _LOOKAHEAD:
            job = self._queue.popleft()
            if job.deadline is not None and job.deadline < now:
                self._forget(job)
                job.finish(Late((now - job.queued_at) * 1000))
                continue
            if batch and (job.key != batch[0].key or rows + job.rows > self._limits.batch_rows):
                passed.append(job)
                continue
            self._forget(job)
            batch.append(job)
            rows += job.rows
            if alone or rows >= self._limits.batch_rows:
                break
        self._queue.extendleft(reversed(passed))
        return batch

    def _inline(self, rows: int) -> bool:
        if not self._model.steady or self._row_s is None or perf_counter() < self._distrusted_until:
            return False
        return self._row_s * rows * 1000 <= self._limits.inline_ms

    def _run(self, batch: list[Job]) -> _Ran:
        """Runs the batch and takes the time. Never raises: whatever happens is the jobs' outcome."""
        start, cpu = perf_counter(), thread_time()
        try:
            ran = self._compute(batch)
        except Exception as exc:  # noqa: BLE001 - a batch must never take the loop or the worker down
            error = ModelFailed(f"the model failed: {type(exc).__name__}: {exc}")
            ran = _Ran(batch[0].feeds, None, [error for _ in batch])
        ran.start, ran.wall_s, ran.cpu_s = start, perf_counter() - start, thread_time() - cpu
        return ran

    def _compute(self, batch: list[Job]) -> _Ran:
        """Runs the batch as one; if that fails, each job alone, so that only the one at fault errs."""
        if len(batch) == 1:
            job = batch[0]
            outcome = self._alone(job)
            return _Ran(job.feeds, None if isinstance(outcome, Refused) else outcome, [outcome])
        feeds = {name: np.concatenate([job.feeds[name] for job in batch]) for name in self._names}
        rows = sum(job.rows for job in batch)
        try:
            outputs = self._model.run(feeds)
        except ModelFailed:
            return _Ran(feeds, None, [self._alone(job) for job in batch])
        if any(not values.ndim or values.shape[0] != rows for values in outputs):
            self._model.forbid_batching()
            return _Ran(feeds, None, [self._alone(job) for job in batch])
        outcomes: list[Outcome] = []
        start = 0
        for job in batch:
            end = start + job.rows
            outcomes.append([values[start:end] for values in outputs])
            start = end
        return _Ran(feeds, outputs, outcomes)

    def _alone(self, job: Job) -> Outcome:
        self._begins(job.rows)
        try:
            return self._model.run(job.feeds)
        except ModelFailed as exc:
            return exc

    def _worker(self) -> SimpleQueue[list[Job] | None]:
        if self._work is None:
            self._work = SimpleQueue()
            threading.Thread(target=self._run_worker, args=(self._work,), name="model", daemon=True).start()
        return self._work

    def _run_worker(self, work: SimpleQueue[list[Job] | None]) -> None:
        while (batch := work.get()) is not None:
            ran = self._run(batch)
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, ran, False)
            except RuntimeError:  # the loop was closed: the process is leaving
                return

    def _finish(self, batch: list[Job], ran: _Ran, inline: bool) -> None:
        self._metrics.running_rows = 0
        self._hangs_at = None
        self._account(batch, ran, inline)
        for job, outcome in zip(batch, ran.outcomes, strict=True):
            job.finish(outcome)
        if ran.outputs is not None:
            self._show([job.id for job in batch], [job.rows for job in batch], ran.feeds, ran.outputs, 200)
        else:
            for job, outcome in zip(batch, ran.outcomes, strict=True):
                if isinstance(outcome, Refused):
                    self._show([job.id], [job.rows], job.feeds, [], 500)
                else:
                    self._show([job.id], [job.rows], job.feeds, outcome, 200)
        if self._queue:
            self._loop.call_soon(self._turn)
        else:
            self._busy = False

    def _account(self, batch: list[Job], ran: _Ran, inline: bool) -> None:
        metrics = self._metrics
        rows = 0
        for job in batch:
            rows += job.rows
            metrics.queue_ms.add((ran.start - job.queued_at) * 1000)
        metrics.runs += 1
        metrics.run_s += ran.wall_s
        metrics.rows += rows
        metrics.batch_rows.add(rows)
        per_row = ran.cpu_s / rows if rows else ran.cpu_s
        self._row_s = per_row if self._row_s is None else 0.8 * self._row_s + 0.2 * per_row
        if inline and ran.cpu_s * 1000 > _OVERRUN * self._limits.inline_ms:
            self._distrusted_until = perf_counter() + _DISTRUST_S

    def _show(self, ids: list[str], rows: list[int], feeds: Feeds, outputs: Sequence[Array], status: int) -> None:
        total = sum(rows)
        if outputs:
            predictions = self._predictor.of(outputs, total)
            self._metrics.prediction.add_many(predictions)
        else:
            predictions = np.full(total, np.nan)
        if self._keeper is not None:
            self._keeper.keep(ids, rows, feeds, predictions, status)
