"""Labels that come late, for thousands of simulated rollouts, through the functions that judge real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies import labels
from policies.evidence import Sums
from policies.labels import Learned
from tests.benchmarks.streams import Part

WRONG = 0.10  # of the stable version's answers
APART = 0.02  # of the requests, each version alone is wrong, where the two are equally good
LABELLED = 0.8  # of the answers ever get a label


def blank(rollouts: int) -> Learned:
    """`labels.Learned()`, for so many rollouts."""
    zeros = np.zeros((rollouts, len(labels.STAKES)))
    return Learned(worse_pairs=zeros, worse_apart=zeros, fine_pairs=zeros, fine_apart=zeros)


def quality_alarms(
    rps: NDArray[np.float64], parts: Sequence[Part], worse: float, margin: float, alpha: float, lag_s: float,
    tick_s: float = 10.0, seed: int = 61,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:  # fmt: skip
    """(who is rolled back, the candidate's requests until then) by the accuracy of candidates that are `worse`.

    Each answer's label comes `lag_s` after it, or never. Each tick is a look.
    """
    generator = np.random.default_rng(seed)
    rollouts = len(rps)
    learned, failed = blank(rollouts), np.zeros(rollouts, dtype=bool)
    seen, requests = np.zeros(rollouts), np.full(rollouts, np.nan)
    late: list[tuple[Sums, Sums, Sums]] = []
    for part in parts:
        for _ in range(round(part.seconds / tick_s)):
            total = generator.poisson(rps * tick_s)
            both = total if part.copies else generator.binomial(total, 1.0 - part.weight) if part.watch else 0 * total
            own = total - both if part.watch else 0 * total if part.copies else generator.binomial(total, part.weight)
            other = 0 * total if part.copies or part.watch else total - own
            seen += both + own
            late.append(_losses(generator, worse, *(generator.binomial(n, LABELLED) for n in (both, own, other))))
            if len(late) * tick_s <= lag_s:
                continue
            learned = labels.count(learned, *late.pop(0), margin)
            fresh = (labels.log_worse(learned) >= -math.log(alpha)) & ~failed
            requests[fresh] = seen[fresh]
            failed |= fresh
    return failed, requests


def _losses(
    generator: np.random.Generator, worse: float, both: NDArray[np.int64], own: NDArray[np.int64],
    other: NDArray[np.int64],
) -> tuple[Sums, Sums, Sums]:  # fmt: skip
    """Sums of the pairs' differences, of the candidate's losses, of the stable version's."""
    only_c = generator.binomial(both, APART + worse)
    only_s = generator.binomial(both - only_c, APART / (1.0 - APART - worse))
    wrong_c, wrong_s = generator.binomial(own, WRONG + worse), generator.binomial(other, WRONG)
    pairs = Sums(both, only_c - only_s, only_c + only_s)
    return pairs, Sums(own, wrong_c, wrong_c), Sums(other, wrong_s, wrong_s)
