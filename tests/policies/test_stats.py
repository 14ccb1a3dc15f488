"""The scores keep what they promise: as long as the hypothesis holds, their expectation never exceeds 1.

For small numbers of requests that is no matter of simulation: the expectation is a finite sum, and is summed here.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from scipy.stats import hypergeom

from policies import stats
from policies.stats import Margin

rate = st.floats(0.001, 0.9)
size = st.integers(0, 25)


def pmf(n: int, p: float) -> np.ndarray:
    """The binomial law (SciPy's own overflows for the smallest of numbers)."""
    k = np.arange(n + 1)
    ways = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return np.exp(ways + special.xlogy(k, p) + special.xlog1py(n - k, -p))


def expectation(n_c: int, n_s: int, p_c: float, p_s: float, log_score: np.ndarray) -> float:
    """Of exp(log_score[k_c, k_s]) over independent requests."""
    weights = pmf(n_c, p_c)[:, None] * pmf(n_s, p_s)[None, :]
    return float((weights * np.exp(log_score)).sum())


def tables(n_c: int, n_s: int) -> tuple[np.ndarray, np.ndarray]:
    k_c, k_s = np.meshgrid(np.arange(n_c + 1), np.arange(n_s + 1), indexing="ij")
    return k_c, k_s


@given(n_c=size, n_s=size, p_s=rate, part=st.floats(0.0, 1.0))
def test_a_candidate_that_is_no_worse_never_earns_an_alarm(n_c: int, n_s: int, p_s: float, part: float) -> None:
    """Expectation at most 1 for every ratio bet on, for any rates with the candidate's no higher."""
    k_c, k_s = tables(n_c, n_s)
    scores = stats.alarm_step(n_c, k_c, n_s, k_s)
    for which in range(len(stats.ALARM_RATIOS)):
        assert expectation(n_c, n_s, p_s * part, p_s, scores[..., which]) <= 1.0 + 1e-9


@settings(max_examples=300)
@given(
    n_c=size, n_s=size, guess=st.floats(1e-6, 0.5), p_s=st.floats(0.0, 0.9), beyond=st.floats(0.0, 0.3),
    ratio=st.sampled_from([1.0, 1.5, 3.0]), shift=st.sampled_from([0.001, 0.02, 0.2]), temper=st.sampled_from([1.0, 4]),
)  # fmt: skip
def test_a_candidate_beyond_the_margin_never_earns_a_pass(
    n_c: int, n_s: int, guess: float, p_s: float, beyond: float, ratio: float, shift: float, temper: float
) -> None:
    """Expectation at most 1 whatever was guessed, for any rates on the margin or beyond it."""
    p_c = ratio * p_s + shift + beyond
    if p_c > 1.0:
        return
    k_c, k_s = tables(n_c, n_s)
    scores = stats.pass_step(n_c, k_c, n_s, k_s, guess, ratio, shift, temper)
    assert expectation(n_c, n_s, p_c, p_s, scores) <= 1.0 + 1e-7


@given(n=st.integers(0, 60), bound=st.floats(0.01, 0.9), part=st.floats(0.0, 1.0))
def test_a_share_within_the_bound_is_never_called_above_it(n: int, bound: float, part: float) -> None:
    k = np.arange(n + 1)
    above = pmf(n, bound * part) @ np.exp(stats.share_above(n, k, bound))
    below = pmf(n, bound + (1 - bound) * part) @ np.exp(stats.share_below(n, k, bound))
    assert above <= 1.0 + 1e-9
    assert below <= 1.0 + 1e-9


@given(n=st.integers(0, 60), share=st.floats(0.01, 0.99))
def test_traffic_split_as_meant_is_never_called_otherwise(n: int, share: float) -> None:
    k = np.arange(n + 1)
    assert math.isclose(pmf(n, share) @ np.exp(stats.share_differs(n, k, share)), 1.0, rel_tol=1e-9)


@given(
    theta=st.floats(0.001, 0.4), n_c=st.integers(1, 10**6), n_s=st.integers(1, 10**6),
    ratio=st.sampled_from([1.0, 2.0]), shift=st.sampled_from([0.001, 0.05]),
)  # fmt: skip
def test_the_projection_is_the_nearest_point_of_the_margin(
    theta: float, n_c: int, n_s: int, ratio: float, shift: float
) -> None:
    """Checked against a general minimiser of the same divergence."""

    def divergence(x: float) -> float:
        y = ratio * x + shift
        part_c = theta * math.log(theta / y) + (1 - theta) * math.log((1 - theta) / (1 - y))
        part_s = theta * math.log(theta / x) + (1 - theta) * math.log((1 - theta) / (1 - x))
        return (n_c * part_c + n_s * part_s) / (n_c + n_s)

    best = optimize.minimize_scalar(divergence, bounds=(1e-9, (1 - shift) / ratio - 1e-9), method="bounded")
    x_c, x_s = stats.project(theta, theta, n_c, n_s, ratio, shift)
    assert float(x_c) == pytest.approx(ratio * float(x_s) + shift)
    assert divergence(float(x_s)) <= best.fun + 1e-9


def test_without_any_error_a_pass_needs_about_three_over_the_margin_requests() -> None:
    """ln(20) / 0.02 is 150: a healthy service gets its versions promoted."""
    needed = math.log(20) / float(stats.pass_step(1, 0, 4, 0, 1e-4, 1.0, 0.02))
    assert 140 < needed < 165


@given(n_c=st.integers(1, 5000), n_s=st.integers(1, 5000), a=st.floats(0, 1), b=st.floats(0, 1))
def test_the_interval_holds_the_estimate_and_shrinks_with_n(n_c: int, n_s: int, a: float, b: float) -> None:
    k_c, k_s = round(a * n_c), round(b * n_s)
    low, high = stats.difference_interval(n_c, k_c, n_s, k_s, 0.05)
    assert -1.0 <= low <= k_c / n_c - k_s / n_s <= high <= 1.0
    wide = stats.difference_interval(100 * n_c, 100 * k_c, 100 * n_s, 100 * k_s, 0.05)
    assert wide[1] - wide[0] <= high - low + 1e-6


def test_no_request_at_all_leaves_every_difference_possible() -> None:
    assert stats.difference_interval(0, 0, 100, 0, 0.05) == (-1.0, 1.0)
    assert stats.share_interval(0, 0, 0.05) == (0.0, 1.0)


@given(n=st.integers(1, 10**5), part=st.floats(0, 1))
def test_the_share_interval_holds_the_share(n: int, part: float) -> None:
    k = round(part * n)
    low, high = stats.share_interval(n, k, 0.05)
    assert 0.0 <= low <= k / n <= high <= 1.0


@given(rows_c=st.integers(1, 300), rows_s=st.integers(1, 300), a=st.floats(0, 1), b=st.floats(0, 1))
def test_missing_values_are_judged_as_by_the_hypergeometric_law(rows_c: int, rows_s: int, a: float, b: float) -> None:
    missing_c, missing_s = round(a * rows_c), round(b * rows_s)
    ours = stats.more_missing(rows_c, missing_c, rows_s, missing_s)
    theirs = hypergeom.sf(missing_c - 1, rows_c + rows_s, missing_c + missing_s, rows_c)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-12)


def test_the_ladder_ends_at_the_final_margin() -> None:
    assert stats.factors(3) == (4.0, 2.0, 1.0)
    assert stats.factors(1) == (1.0,)
    assert Margin(2.0, 0.001).times(4.0) == Margin(5.0, 0.004)
    assert Margin(1.0, 0.3).times(4.0).shift == 0.5


def test_clusters_are_noticed_and_independent_events_are_not() -> None:
    generator = np.random.default_rng(5)
    alone = generator.binomial(10, 0.3, 400)
    clustered = 5 * generator.binomial(2, 0.3, 400)
    for counts, low, high in ((alone, 1.0, 1.2), (clustered, 4.0, 6.0)):
        squares = ((counts - 3.0) ** 2).sum()
        assert low <= float(stats.dispersion(squares, 400 * 2.1)) <= high
