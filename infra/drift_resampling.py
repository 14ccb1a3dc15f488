"""How much of the distance between two windows is chance: their rows shuffled (a permutation test), and drawn anew.

The rows of both windows stand in one array; a window is how often each of them counts. A column's `Measure` is its
distance between two such windows. Rows of one request resemble each other, so whole requests are shuffled and drawn:
`of` says which request each row is of, by number, the first window's before the second's; None: each is its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.shifts import RESAMPLES

_ENOUGH_LARGER = 10  # permutations with a larger distance after which the p-value is known well enough
_SD_LEAST = 0.001  # what Evidently divides the distance by at least

Counted = NDArray[np.int64]
Requests = NDArray[np.int64]
Distance = Callable[[NDArray[Any], NDArray[Any]], float]
Measure = Callable[[Counted, Counted], float]


def present(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values are there: not None, not NaN, not infinite."""
    if values.dtype == object:
        return np.array([value is not None for value in values], dtype=bool)
    return np.asarray(np.isfinite(values))


def by_repeating(distance: Distance, pooled: NDArray[Any]) -> Measure:
    """The measure of any distance. Where one side has no value, that is for the test of missing values to say: 0."""
    there = present(pooled)
    values = pooled[there]

    def measure(first: Counted, second: Counted) -> float:
        sides = np.repeat(values, first[there]), np.repeat(values, second[there])
        return distance(*sides) if sides[0].size and sides[1].size else 0.0

    return measure


def wasserstein(pooled: NDArray[np.float64]) -> Measure:
    """The normed Wasserstein distance, as Evidently has it, for rows that are sorted only once."""
    rows = np.flatnonzero(present(pooled))
    rows = rows[np.argsort(pooled[rows], kind="stable")]
    values = pooled[rows]
    values = values - values.mean() if values.size else values  # nearer to 0, so that the squares keep their digits
    gaps, squares = np.diff(values), values**2

    def measure(first: Counted, second: Counted) -> float:
        a, b = first[rows], second[rows]
        n, m = int(a.sum()), int(b.sum())
        if not n or not m:
            return 0.0
        mean = _dot(a, values) / n
        variance = max(_dot(a, squares) / n - mean**2, 0.0)
        apart = _dot(np.abs(np.cumsum(a)[:-1] / n - np.cumsum(b)[:-1] / m), gaps)
        return apart / max(math.sqrt(variance), _SD_LEAST)

    return measure


def _dot(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The sum of the products. `@` starts threads for long rows, which wait a hundred times longer than they work where
    all cores are busy."""
    return float(np.einsum("i,i", first, second))


def windows(first: int, second: int, of: Requests | None = None) -> tuple[Counted, Counted]:
    """Both windows as they are, of so many requests: each row once."""
    ours = _rows((np.arange(first + second) < first).astype(np.int64), of)
    return ours, 1 - ours


def _rows(requests: Counted, of: Requests | None) -> Counted:
    """How often each row counts, where the requests count that often."""
    return requests if of is None else requests[of]


def shuffled(
    measures: Sequence[Measure],
    first: int,
    second: int,
    permutations: int,
    generator: np.random.Generator,
    of: Requests | None = None,
) -> tuple[NDArray[np.float64], float]:
    """The chance of distances as large, did all requests come from one source: per column, and of the largest.

    Stopped early where it is no small one: Besag and Clifford, "Sequential Monte Carlo p-values", Biometrika 1991.
    """
    seen = np.array([measure(*windows(first, second, of)) for measure in measures])
    larger, larger_max, done = np.zeros(len(measures)), 0, 0
    while done < permutations and larger_max < _ENOUGH_LARGER:
        requests = np.zeros(first + second, dtype=np.int64)
        requests[generator.permutation(first + second)[:first]] = 1
        ours = _rows(requests, of)
        permuted = np.array([measure(ours, 1 - ours) for measure in measures])
        done += 1
        larger += permuted >= seen
        larger_max += bool(permuted.max() >= seen.max())
    chance = larger_max / done if larger_max >= _ENOUGH_LARGER else (larger_max + 1) / (done + 1)
    return (larger + 1) / (done + 1), chance


def drawn(
    measures: Sequence[Measure], first: int, second: int, generator: np.random.Generator, of: Requests | None = None
) -> NDArray[np.float64]:
    """The distances of `RESAMPLES` pairs of windows, drawn anew from the requests of each; a row per draw."""
    found = []
    for _ in range(RESAMPLES):
        ours = np.bincount(generator.integers(0, first, first), minlength=first + second)
        theirs = np.bincount(first + generator.integers(0, second, second), minlength=first + second)
        found.append([measure(_rows(ours, of), _rows(theirs, of)) for measure in measures])
    return np.array(found, dtype=float)
