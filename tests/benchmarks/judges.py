"""This project's gates on a batch of rollouts: the same functions as in `policies.gates`, with a leading axis."""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.drift_resampling import drawn
from infra.drift_resampling import wasserstein as measure_of
from policies import rates, shifts, stats
from policies.evidence import ColumnDrift, Drift
from policies.policy import Drifting
from policies.rates import Rates
from policies.stats import Margin
from policies.verdict import Verdict
from tests.benchmarks.peers import Judge
from tests.benchmarks.streams import Tick

Array = NDArray[np.float64]


def blank(rollouts: int, rungs: int) -> Rates:
    """`rates.begin`, for so many rollouts."""
    one = rates.begin(rungs)
    return Rates(**{f.name: np.tile(np.asarray(getattr(one, f.name), dtype=float), _reps(one, f.name, rollouts))
                    for f in fields(Rates)})  # fmt: skip


def _reps(one: Rates, name: str, rollouts: int) -> tuple[int, ...]:
    return (rollouts, 1) if np.ndim(getattr(one, name)) else (rollouts,)


def enter(known: Rates, moved: NDArray[np.bool_]) -> Rates:
    """`rates.enter_stage`, for those that moved."""
    new = rates.enter_stage(known)

    def pick(name: str) -> Array:
        old, fresh = (np.asarray(getattr(side, name), dtype=float) for side in (known, new))
        return np.where(moved[:, None] if old.ndim == 2 else moved, fresh, old)

    return Rates(**{f.name: pick(f.name) for f in fields(Rates)})


class Lockgate(Judge):
    """The gates `errors` and `latency`; `gates` share the error budget with them."""

    name = "lockgate"

    def __init__(
        self, rollouts: int, stages: int, errors: Margin, latency: Margin, budget: float = 0.05, gates: int = 4,
        cluster: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(rollouts)
        self.alpha, self.stages, self.cluster = budget / gates, stages, cluster
        factors = (*stats.factors(stages - 1), 1.0)
        self.ladders = [tuple(margin.times(f) for f in factors) for margin in (errors, latency)]
        self.known = [blank(rollouts, stages), blank(rollouts, stages)]
        self.stage = np.zeros(rollouts, dtype=int)

    def tick(self, tick: Tick) -> None:
        """Copies count, too."""
        self.seen += tick.n_c
        fresh = self.decide(tick) & ~self.failed
        self.requests[fresh] = self.seen[fresh]
        self.failed |= fresh

    def decide(self, tick: Tick) -> NDArray[np.bool_]:
        stage = np.broadcast_to(np.asarray(tick.stage), self.stage.shape)
        moved = stage > self.stage
        self.stage = stage.copy()
        worse = np.zeros(len(self.failed), dtype=bool)
        for i, (k_c, k_s) in enumerate(((tick.k_c, tick.k_s), (tick.slow_c, tick.slow_s))):
            if moved.any():
                self.known[i] = enter(self.known[i], moved)
            known = rates.tick(self.known[i], tick.n_c, k_c, tick.n_s, k_s, stage, self.ladders[i], self.cluster)
            self.known[i] = known
            alarm = rates.log_worse(known, self.stages) >= -math.log(self.alpha)
            worse |= alarm & rates.beyond_half(known, self.ladders[i][-1])
        return worse

    def passes(self) -> NDArray[np.bool_]:
        """Who could leave the stage."""
        ready = np.ones(len(self.failed), dtype=bool)
        for known in self.known:
            enough = np.minimum(known.stage_n_c, known.stage_n_s) >= 20
            ready &= enough & (rates.log_no_worse(known, self.stage) >= math.log(20.0))
        return ready


# ---------------------------------------------------------------- drift


def wasserstein(first: Array, second: Array) -> float:
    """Evidently's normed distance; `tests/infra` holds the adapter to the same formula."""
    grid = np.sort(np.concatenate([first, second]))
    cdf = [np.searchsorted(np.sort(side), grid[:-1], side="right") / len(side) for side in (first, second)]
    return float((np.abs(cdf[0] - cdf[1]) * np.diff(grid)).sum() / max(float(np.std(first)), 0.001))


@functools.lru_cache(maxsize=3)
def _bank(n: int, m: int, permutations: int) -> NDArray[np.float32]:
    """How far apart the two empirical distributions are at each place of the sorted pooled rows, per permutation.

    They do not depend on the rows, so that one set of permutations serves all comparisons of a size.
    """
    generator = np.random.default_rng([n, m])
    places = np.arange(1, n + m, dtype=np.float32)
    bank = np.empty((permutations, n + m - 1), dtype=np.float32)
    for row in range(permutations):
        labels = np.zeros(n + m, dtype=np.float32)
        labels[generator.permutation(n + m)[:n]] = 1.0
        bank[row] = _apart(np.cumsum(labels)[:-1], places, n, m)
    return bank


def _apart(ahead: Any, places: Any, n: int, m: int) -> Any:
    return np.abs(ahead / n - (places - ahead) / m)


def compare(first: Array, second: Array, generator: np.random.Generator, permutations: int = 1999) -> Drift:
    """What `infra.drift_worker.compare` does for one column (its upper limit aside).

    The permuted distances are over the pooled windows' standard deviation instead of the permuted reference's own.
    """
    n, m = len(first), len(second)
    pooled = np.concatenate([first, second])
    order = np.argsort(pooled, kind="stable")
    gaps = np.diff(pooled[order]).astype(np.float32)
    # einsum instead of @, as in `infra.drift_resampling`.
    bank = _bank(n, m, permutations)
    mine = np.cumsum((order < n).astype(np.float32))[:-1]
    seen = float(np.einsum("i,i", _apart(mine, np.arange(1, n + m, dtype=np.float32), n, m), gaps))
    start = int(generator.integers(permutations))
    larger = done = 0
    for size in (64, 192, 512, permutations - 768):
        rows = np.arange(start + done, start + done + size) % permutations
        hits = np.einsum("ij,j", bank[rows], gaps) >= seen
        if larger + hits.sum() >= 10:
            done += int(np.argmax(np.cumsum(hits) >= 10 - larger)) + 1
            larger = 10
            break
        larger, done = larger + int(hits.sum()), done + size
    chance = larger / done if larger >= 10 else (larger + 1) / (done + 1)
    seen = wasserstein(first, second)
    mean, error = _resampled(first, second, generator) if chance < 0.01 else (seen, None)  # else no alarm
    column = ColumnDrift("prediction", "wasserstein", seen, chance, error=error, bias=max(mean - seen, 0.0))
    return Drift(n, m, (column,), chance, 1.0 / (permutations + 1))


def _resampled(first: Array, second: Array, generator: np.random.Generator) -> tuple[float, float]:
    """Mean and standard deviation of the distances of windows drawn anew from the rows of each."""
    measure = measure_of(np.concatenate([first, second]))
    found = drawn([measure], len(first), len(second), generator)
    return float(found.mean()), float(found.std(ddof=1))


def drift_verdicts(
    gate: Drifting, comparisons: list[tuple[int, float, Drift]], lengths: list[float], alpha: float
) -> list[Verdict]:
    """What the drift gate says to (stage, seconds in it, comparison), one after the other."""
    shift, last, said = shifts.Shift(), 0, []
    factors = (*stats.factors(len(lengths) - 1), 1.0)
    for stage, elapsed, seen in comparisons:
        shift = shifts.enter_stage(shift) if stage > last else shift
        last = stage
        scene = shifts.Scene(elapsed, lengths[stage], len(lengths), factors[stage], alpha)
        shift, report = shifts.look(gate, shift, scene, seen, None)
        said.append(report.verdict)
    return said
