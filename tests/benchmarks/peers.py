"""The rules that others judge a canary by, written from their published definitions, for whole batches of rollouts.

Kayenta       `MannWhitneyClassifier` with the Netflix judge's confidence 0.98 and tolerance 0.25, direction `Increase`:
              "High" when the lower confidence limit of the Hodges-Lehmann shift lies above 0.25 of the shift itself.
              A point a minute; judged every ten minutes on all points so far.
Flagger       each minute a check: the success rate is 99 % or more; `threshold: 5` failed checks roll back.
Argo Rollouts each five minutes a measurement with `successCondition: result[0] >= 0.95`; more than `failureLimit`
              failed ones abort.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from tests.benchmarks.streams import Tick

Array = NDArray[np.float64]


def mann_whitney(experiment: Array, control: Array, confidence: float = 0.98, tolerance: float = 0.25) -> Array:
    """Kayenta's class per row: 1 for High, 0 for Pass (or no data). NaN points are dropped.

    The limits are those order statistics of the pairwise differences that the normal approximation of the rank-sum
    gives (Hollander and Wolfe, "Nonparametric Statistical Methods", 4.3).
    """
    found = np.zeros(len(experiment))
    differences = np.sort((experiment[:, :, None] - control[:, None, :]).reshape(len(experiment), -1), axis=1)
    m, n = np.isfinite(experiment).sum(axis=1), np.isfinite(control).sum(axis=1)
    z = norm.ppf(0.5 + confidence / 2.0)
    for row in range(len(experiment)):
        pairs = int(m[row] * n[row])
        if pairs == 0 or np.array_equal(experiment[row], control[row], equal_nan=True):
            continue
        below = int(np.floor(pairs / 2.0 - z * np.sqrt(pairs * (m[row] + n[row] + 1.0) / 12.0)))
        if below < 1:
            continue  # too few points for an interval at this confidence
        shift = float(differences[row, (pairs - 1) // 2 : pairs // 2 + 1].mean())  # the median: they are sorted
        found[row] = differences[row, below - 1] > tolerance * abs(shift)
    return found


class Judge(ABC):
    """One rule on a batch of rollouts: who was rolled back, and after how many of the candidate's requests."""

    name = ""

    def __init__(self, rollouts: int) -> None:
        self.failed = np.zeros(rollouts, dtype=bool)
        self.requests = np.full(rollouts, np.nan)
        self.seen = np.zeros(rollouts)

    def tick(self, tick: Tick) -> None:
        """One more tick."""
        self.seen += tick.n_c
        if tick.copies:
            return  # none of these rules has a shadow stage
        fresh = self.decide(tick) & ~self.failed
        self.requests[fresh] = self.seen[fresh]
        self.failed |= fresh

    @abstractmethod
    def decide(self, tick: Tick) -> NDArray[np.bool_]:
        """Who is rolled back at this tick."""


class _Windowed(Judge):
    """A rule on the sums of `window_s` seconds."""

    window_s = 60.0

    def __init__(self, rollouts: int) -> None:
        super().__init__(rollouts)
        self.sums = np.zeros((4, rollouts))
        self.until: float | None = None

    def decide(self, tick: Tick) -> NDArray[np.bool_]:
        self.until = tick.at + self.window_s if self.until is None else self.until
        fails = np.zeros(len(self.failed), dtype=bool)
        if tick.at >= self.until:
            fails = self.window(*self.sums)
            self.sums = np.zeros_like(self.sums)
            self.until += self.window_s
        self.sums += np.array([tick.n_c, tick.k_c, tick.n_s, tick.k_s])
        return fails

    @abstractmethod
    def window(self, n_c: Array, k_c: Array, n_s: Array, k_s: Array) -> NDArray[np.bool_]:
        """Who is rolled back after this window."""


class Flagger(_Windowed):
    """`request-success-rate` with `thresholdRange: {min: 99}`, `interval: 1m`, `threshold: 5`."""

    name = "Flagger"

    def __init__(self, rollouts: int, success: float = 0.99, threshold: int = 5) -> None:
        super().__init__(rollouts)
        self.success, self.threshold, self.checks = success, threshold, np.zeros(rollouts)

    def window(self, n_c: Array, k_c: Array, n_s: Array, k_s: Array) -> NDArray[np.bool_]:
        self.checks += (n_c > 0) & (1.0 - k_c / np.maximum(n_c, 1.0) < self.success)
        return self.checks >= self.threshold


class Argo(_Windowed):
    """`successCondition: result[0] >= 0.95`, `interval: 5m`, with a `failureLimit`."""

    window_s = 300.0

    def __init__(self, rollouts: int, failure_limit: int = 3, success: float = 0.95) -> None:
        super().__init__(rollouts)
        self.name = f"Argo, failureLimit {failure_limit}"
        self.limit, self.success, self.failures = failure_limit, success, np.zeros(rollouts)

    def window(self, n_c: Array, k_c: Array, n_s: Array, k_s: Array) -> NDArray[np.bool_]:
        self.failures += (n_c > 0) & (1.0 - k_c / np.maximum(n_c, 1.0) < self.success)
        return self.failures > self.limit


class Kayenta(_Windowed):
    """Error rate a minute, canary against baseline; judged every ten minutes on what came so far."""

    name = "Kayenta"

    def __init__(self, rollouts: int) -> None:
        super().__init__(rollouts)
        self.points: list[tuple[Array, Array]] = []

    def window(self, n_c: Array, k_c: Array, n_s: Array, k_s: Array) -> NDArray[np.bool_]:
        self.points.append(
            (np.where(n_c > 0, k_c / np.maximum(n_c, 1), np.nan), np.where(n_s > 0, k_s / np.maximum(n_s, 1), np.nan))
        )
        if len(self.points) % 10:
            return np.zeros(len(self.failed), dtype=bool)
        canary, baseline = (np.array(side).T for side in zip(*self.points, strict=True))
        return mann_whitney(canary, baseline) > 0
