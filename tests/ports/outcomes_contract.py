"""What every Telemetry promises of labelled answers.

A subclass gives `served`: a function that lets the candidate "2" and the stable version "1" of model "m" answer copies
of the same 1,000 requests, of which they are wrong in the given shares, with the given share of labels having come; it
returns the telemetry.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from policies.faults import of_outcomes
from tasks.ports import Telemetry

Served = Callable[[float, float, float], Telemetry]


class OutcomesContract:
    """Inherit it."""

    SINCE = 0.0

    @pytest.mark.parametrize(("stable", "candidate"), [(0.1, 0.3), (0.3, 0.1), (0.2, 0.2)])
    def test_the_difference_of_the_losses_is_that_of_the_answers(
        self, served: Served, stable: float, candidate: float
    ) -> None:
        seen = served(stable, candidate, 1.0).outcomes("m", "1", "2", "accuracy", self.SINCE, 1e10)
        assert of_outcomes(seen) == ""
        assert seen.since == self.SINCE
        assert seen.pairs.n == 1000
        assert seen.pairs.mean == pytest.approx(candidate - stable)
        assert seen.waiting == 0

    def test_answers_without_a_label_are_not_counted_but_told(self, served: Served) -> None:
        seen = served(0.1, 0.1, 0.25).outcomes("m", "1", "2", "accuracy", self.SINCE, 1e10)
        assert (seen.pairs.n, seen.waiting) == (250, 750)

    def test_asked_twice_it_says_the_same(self, served: Served) -> None:
        telemetry = served(0.1, 0.2, 1.0)
        first, second = (telemetry.outcomes("m", "1", "2", "accuracy", self.SINCE, 1e10) for _ in range(2))
        assert first == second
