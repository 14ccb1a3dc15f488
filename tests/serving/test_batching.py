"""Micro-batching: what comes together runs together, each gets its own answer, and every bound holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from serving.batching import Batcher, Job, Limits, Outcome, Predictor
from serving.errors import Busy, Late, ModelFailed
from serving.metrics import Metrics
from serving.model import Model
from serving.tensors import Array
from tests.serving import models


class Bench:
    """A batcher on a real model and a real loop; `outcomes` by job id, `kept` what was shown for sampling."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model = model
        self.metrics = Metrics("m", "1", "e")
        self.outcomes: dict[str, Outcome] = {}
        self.kept: list[tuple[list[str], list[int], list[float], int]] = []
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(loop, model, limits, self.metrics, Predictor(0), self)

    def keep(
        self, ids: Sequence[str], rows: Sequence[int], feeds: dict[str, Array], predictions: Array, status: int
    ) -> None:
        self.kept.append((list(ids), list(rows), predictions.tolist(), status))

    def submit(self, job_id: str, deadline: float | None = None, **feeds: Array) -> None:
        rows = len(next(iter(feeds.values())))
        size = sum(values.nbytes for values in feeds.values())
        self.batcher.submit(
            Job(job_id, feeds, rows, size, deadline, lambda outcome: self.outcomes.update({job_id: outcome}))
        )

    async def settle(self) -> None:
        async with asyncio.timeout(20):
            while not self.batcher.idle:  # noqa: ASYNC110 - the batcher has no event for it, and needs none
                await asyncio.sleep(0)

    def values(self, job_id: str) -> list[float]:
        outcome = self.outcomes[job_id]
        assert not isinstance(outcome, Exception), outcome
        return outcome[0].reshape(-1).tolist()


def run(path: Path, story: Callable[[Bench], object], limits: Limits | None = None) -> Bench:
    """Tells the story to a bench within one turn of the loop, then lets it settle."""

    async def told() -> Bench:
        bench = Bench(Model.load(path), limits or Limits())
        story(bench)
        await bench.settle()
        bench.batcher.close()
        return bench

    return asyncio.run(told())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.onnx"


def floats(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


def test_what_one_turn_brought_in_runs_as_one_batch_and_each_gets_its_own_answer(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        for at in range(20):
            bench.submit(f"j{at}", i=np.arange(at % 3 + 1))

    bench = run(path, story)
    assert bench.metrics.runs == 1
    assert bench.metrics.rows == sum(at % 3 + 1 for at in range(20))
    for at in range(20):
        assert bench.values(f"j{at}") == [10, 20, 30][: at % 3 + 1]
    assert len(bench.kept) == 1
    assert bench.kept[0][1] == [at % 3 + 1 for at in range(20)]


def test_only_the_job_at_fault_errs(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        bench.submit("good", i=np.array([1]))
        bench.submit("bad", i=np.array([99]))
        bench.submit("fine", i=np.array([2, 3]))

    bench = run(path, story)
    assert bench.values("good") == [20]
    assert bench.values("fine") == [30, 40]
    assert isinstance(bench.outcomes["bad"], ModelFailed)
    assert [(ids, status) for ids, _, _, status in bench.kept] == [(["good"], 200), (["bad"], 500), (["fine"], 200)]
    assert np.isnan(bench.kept[1][2]).all()


def test_a_batch_never_exceeds_the_cap_but_a_larger_request_still_runs(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        for at in range(10):
            bench.submit(f"j{at}", i=np.zeros(3, dtype=np.int64))
        bench.submit("large", i=np.zeros(50, dtype=np.int64))

    bench = run(path, story, Limits(batch_rows=8))
    assert bench.metrics.runs == 6  # five of two jobs each (a third would not fit), then the large one
    assert len(bench.values("large")) == 50


def test_rows_of_different_widths_are_not_joined(path: Path) -> None:
    models.two_inputs(path)

    def story(bench: Bench) -> None:
        for at in range(6):
            width = 2 + at % 2
            bench.submit(f"j{at}", a=np.full((1, width), at, np.float32), s=np.array([str(at)], dtype=object))

    bench = run(path, story)
    assert bench.metrics.runs == 2
    for at in range(6):
        assert bench.values(f"j{at}") == [at * (2 + at % 2)]
        outcome = bench.outcomes[f"j{at}"]
        assert not isinstance(outcome, Exception)
        assert outcome[1].tolist() == [str(at)]


def test_rows_that_look_at_each_other_are_never_joined(path: Path) -> None:
    """The shapes say that rows may be joined; the warm-up finds that the answers would be other ones."""
    models.rows_that_look_at_each_other(path)

    def story(bench: Bench) -> None:
        bench.submit("small", f=floats(1))
        bench.submit("large", f=floats(5))

    bench = run(path, story)
    assert not bench.model.signature.batch
    assert bench.values("small") == [0]
    assert bench.values("large") == [0]


def test_a_model_of_one_row_runs_each_request_alone(path: Path) -> None:
    models.one_row_only(path)

    def story(bench: Bench) -> None:
        for at in range(3):
            bench.submit(f"j{at}", f=np.full((1, 4), at, np.float32))

    bench = run(path, story)
    assert bench.metrics.runs == 3
    assert bench.values("j2") == [4, 4, 4, 4]


def test_a_full_queue_refuses_and_keeps_what_it_has(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        bench.submit("first", i=np.zeros(6, dtype=np.int64))
        bench.submit("second", i=np.zeros(4, dtype=np.int64))
        with pytest.raises(Busy, match="10 rows"):
            bench.submit("third", i=np.zeros(1, dtype=np.int64))

    bench = run(path, story, Limits(queue_rows=10))
    assert set(bench.outcomes) == {"first", "second"}


def test_the_queue_is_bounded_in_bytes_too(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        bench.submit("first", i=np.zeros(10, dtype=np.int64))
        with pytest.raises(Busy, match="100 bytes"):
            bench.submit("second", i=np.zeros(3, dtype=np.int64))

    run(path, story, Limits(queue_bytes=100))


def test_a_request_larger_than_the_queue_runs_when_nothing_else_waits(path: Path) -> None:
    models.picky(path)
    bench = run(path, lambda bench: bench.submit("one", i=np.zeros(99, dtype=np.int64)), Limits(queue_rows=10))
    assert len(bench.values("one")) == 99


def test_the_late_are_told_so_and_cost_no_run(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        bench.submit("late", deadline=perf_counter() - 1, i=np.array([1]))
        bench.submit("in time", deadline=perf_counter() + 60, i=np.array([1]))

    bench = run(path, story)
    assert isinstance(bench.outcomes["late"], Late)
    assert bench.values("in time") == [20]
    assert bench.metrics.rows == 1


def test_a_deadline_is_kept_while_another_request_runs(path: Path) -> None:
    models.slow(path)

    async def told() -> None:
        bench = Bench(Model.load(path), Limits())
        bench.submit("runs", turns=np.array([2000]))
        await asyncio.sleep(0)  # its turn: it leaves for the worker
        bench.submit("waits", deadline=perf_counter(), turns=np.array([0]))
        assert b'lockgate_queue_rows{model="m",version="1"} 1\n' in bench.metrics.text(), "told while the model runs"
        bench.batcher.expire()
        assert b'lockgate_queue_rows{model="m",version="1"} 0\n' in bench.metrics.text()
        assert isinstance(bench.outcomes["waits"], Late)
        assert "runs" not in bench.outcomes
        await bench.settle()
        assert "runs" in bench.outcomes
        bench.batcher.close()

    asyncio.run(told())


def test_a_run_hangs_once_it_lasts_longer_than_its_rows_may(path: Path) -> None:
    """Each request alone, too, where one of a batch was at fault."""
    models.slow(path)

    async def told(row_s: float) -> bool:
        bench = Bench(Model.load(path), Limits(run_s=0.0))
        bench.batcher._row_s = row_s
        bench.submit("runs", turns=np.array([2000]))
        assert not bench.batcher.hangs
        await asyncio.sleep(0)  # its turn: it leaves for the worker
        hung = bench.batcher.hangs
        await bench.settle()
        assert not bench.batcher.hangs
        bench.batcher.close()
        return hung

    assert asyncio.run(told(row_s=0.0))
    assert not asyncio.run(told(row_s=60.0))


def test_each_of_a_batch_that_failed_may_take_its_own_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.picky(path)
    begun = []
    monkeypatch.setattr(Batcher, "_begins", lambda _, rows: begun.append(rows))

    def story(bench: Bench) -> None:
        for number in (1, 99, 2):
            bench.submit(str(number), i=np.array([number]))

    run(path, story)
    assert begun[-3:] == [1, 1, 1]


def test_a_steady_model_runs_on_the_loop_and_one_with_a_loop_in_the_worker(path: Path) -> None:
    models.picky(path)
    assert Model.load(path).steady
    models.slow(path)
    assert not Model.load(path).steady


def test_a_fault_in_the_batcher_itself_is_an_outcome_and_not_a_hang(path: Path) -> None:
    models.picky(path)

    def story(bench: Bench) -> None:
        bench.submit("one", i=np.array([1]))
        bench.submit("two", i=np.array([[1]]))  # cannot be joined with the first: a caller's bug

    bench = run(path, story)
    assert all(isinstance(outcome, ModelFailed) for outcome in bench.outcomes.values())
    assert set(bench.outcomes) == {"one", "two"}
