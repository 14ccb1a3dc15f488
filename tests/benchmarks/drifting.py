"""The drift gate on simulated windows of predictions whose law wanders: that of a world that moves under both versions.

Each comparison is made and judged as a real one is; see `judges.compare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from policies import shifts
from policies.evidence import Drift, rows_max
from policies.policy import Drifting
from policies.verdict import Verdict
from tests.benchmarks.judges import compare, drift_verdicts
from tests.benchmarks.streams import Part

EVERY_S = 4.0  # between two comparisons of a live rollout
Flags = NDArray[np.bool_]


def drift_alarms(
    rollouts: int, rows: int, parts: Sequence[Part], alpha: float, seed: int, shift: float = 0.0, threshold: float = 0.1
) -> Flags:
    """Who is rolled back with windows of so many rows: three comparisons in each part, all that may raise an alarm.

    The predictions' law changes from look to look, the same for both versions; the candidate's are `shift` standard
    deviations higher.
    """
    generator = np.random.default_rng(seed)
    gate = Drifting(threshold=threshold, rows_min=max(min(rows, 3000), 100))
    n = min(rows, rows_max(gate.method))
    lengths = [part.seconds for part in parts]

    def comparisons() -> Iterator[tuple[int, float, Drift]]:
        for stage, length in enumerate(lengths):
            for part in shifts.LOOKS:
                yield stage, part * length, _compared(generator, n, n, shift)

    return np.array([_first(gate, comparisons(), lengths, alpha) is not None for _ in range(rollouts)])


def drift_detection(
    rollouts: int, parts: Sequence[Part], rps: float, alpha: float, seed: int, shift: float, threshold: float
) -> tuple[Flags, NDArray[np.float64]]:
    """(who is rolled back, the candidate's requests until then) by windows that grow with the traffic.

    A part's first comparison is the first with rows enough, on one of the looks that are `EVERY_S` apart; the windows
    are the newest rows, as many as are compared at most. (Two windows of a part then share no row here, or few.)
    """
    generator = np.random.default_rng(seed)
    gate = Drifting(threshold=threshold)
    lengths = [*(part.seconds for part in parts), parts[-1].seconds]  # with the watch, which shares alpha
    failed, requests = np.zeros(rollouts, dtype=bool), np.full(rollouts, np.nan)
    for rollout in range(rollouts):
        looks = list(_looks(gate, parts, rps, generator.uniform(0.0, EVERY_S)))
        seen = ((stage, at, _compared(generator, *rows, shift)) for stage, at, rows, _ in looks)
        found = _first(gate, seen, lengths, alpha)
        if found is not None:
            failed[rollout], requests[rollout] = True, looks[found][3]
    return failed, requests


def _looks(
    gate: Drifting, parts: Sequence[Part], rps: float, phase: float
) -> Iterator[tuple[int, float, tuple[int, int], float]]:
    """(part, seconds in it, rows of stable version and candidate, the candidate's requests so far) of the comparisons
    that may raise an alarm."""
    most = rows_max(gate.method)
    had = [0.0, 0.0]  # of the candidate, of the stable version
    for stage, part in enumerate(parts):
        paces = [rps * part.weight, rps if part.copies else rps * (1.0 - part.weight)]
        spent, at = 0, phase
        while at <= part.seconds and spent < len(shifts.LOOKS):
            c, s = (int(before + pace * at) for before, pace in zip(had, paces, strict=True))
            if min(c, s) >= gate.rows_min and at >= shifts.LOOKS[spent] * part.seconds:
                spent += 1
                # Round numbers of rows, so that the permutations of one size serve many rollouts.
                yield stage, at, (min(s // 100 * 100, most), min(c // 100 * 100, most)), float(c)
            at = min(at + EVERY_S, part.seconds) if at < part.seconds else at + EVERY_S
        had = [before + pace * part.seconds for before, pace in zip(had, paces, strict=True)]


def _compared(generator: np.random.Generator, rows_stable: int, rows_candidate: int, shift: float) -> Drift:
    a, b = generator.uniform(1.5, 4.0), generator.uniform(4.0, 9.0)
    sd = float(np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1.0))))
    return compare(generator.beta(a, b, rows_stable), generator.beta(a, b, rows_candidate) + shift * sd, generator)


def _first(
    gate: Drifting, comparisons: Iterator[tuple[int, float, Drift]], lengths: list[float], alpha: float
) -> int | None:
    """The number of the comparison that fails the candidate."""
    seen: list[tuple[int, float, Drift]] = []
    for number, comparison in enumerate(comparisons):
        seen.append(comparison)
        if drift_verdicts(gate, seen, lengths, alpha)[-1] is Verdict.FAIL:
            return number
    return None
