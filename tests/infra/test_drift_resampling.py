"""What is chance in the distance of two windows: counted, against what is known of them."""

from __future__ import annotations

import numpy as np
from scipy.stats import ks_2samp, wasserstein_distance

from infra.drift_resampling import by_repeating, drawn, shuffled, wasserstein, windows
from policies import shifts
from policies.evidence import ColumnDrift


def test_the_sorted_distance_is_that_of_the_rows_themselves() -> None:
    """Windows of other sizes, with ties, with missing values, and with rows that count several times."""
    generator = np.random.default_rng(1)
    rows = np.concatenate([generator.normal(50.0, 2.0, 300).round(1), generator.normal(50.5, 2.0, 200).round(1)])
    rows[generator.random(500) < 0.1] = np.nan
    for first, second in (windows(300, 200), (generator.integers(0, 4, 500), generator.integers(0, 4, 500))):
        a, b = (np.repeat(rows, side) for side in (first, second))
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
        assert np.isclose(wasserstein(rows)(first, second), wasserstein_distance(a, b) / np.std(a))
        measure = by_repeating(lambda x, y: float(ks_2samp(x, y).statistic), rows)
        assert np.isclose(measure(first, second), ks_2samp(a, b).statistic)


def test_a_side_without_values_is_at_no_distance() -> None:
    """That all are missing is for the test of missing values to say."""
    rows = np.concatenate([np.arange(50.0), np.full(50, np.nan)])
    assert wasserstein(rows)(*windows(50, 50)) == 0.0
    assert by_repeating(lambda _x, _y: 1.0, rows)(*windows(50, 50)) == 0.0


def test_equal_windows_are_called_different_as_rarely_as_asked() -> None:
    generator = np.random.default_rng(2)
    called = 0
    for _ in range(400):
        columns = [wasserstein(generator.lognormal(0.0, 1.0, 200)) for _ in range(3)]
        called += shuffled(columns, 100, 100, 199, generator)[1] <= 0.05
    assert 5 <= called <= 37, "5 % of 400 are 20; fewer or more than that is one in 10,000"


def test_one_column_of_many_that_moved_is_found() -> None:
    generator = np.random.default_rng(3)
    still = [wasserstein(generator.normal(0.0, 1.0, 800)) for _ in range(4)]
    moved = wasserstein(np.concatenate([generator.normal(0.0, 1.0, 400), generator.normal(0.5, 1.0, 400)]))
    each, largest = shuffled([*still, moved], 400, 400, 199, generator)
    assert largest == 1 / 200
    assert each[-1] == 1 / 200


def test_whoever_stands_at_the_threshold_is_called_further_as_rarely_as_asked() -> None:
    """The limit's theorem, on the true thing: 600 pairs of windows exactly a threshold apart."""
    generator = np.random.default_rng(8)
    further = 0
    for _ in range(600):
        rows = np.concatenate([generator.normal(0.0, 1.0, 600), generator.normal(0.2, 1.0, 600)])
        measure = wasserstein(rows)
        anew = drawn([measure], 600, 600, generator)
        seen = measure(*windows(600, 600))
        bias, error = max(float(anew.mean()) - seen, 0.0), float(anew.std(ddof=1))
        further += shifts.lower(ColumnDrift("p", "wasserstein", seen, 0.0, error=error, bias=bias), 0.05) > 0.2
    assert 10 <= further <= 50, "5 % of 600 are 30; more than 50 or fewer than 10 is one in 10,000"


def test_rows_of_one_request_are_one_observation() -> None:
    """Half of what a row holds is its request's: 40 requests of 25 rows are no 1,000 rows."""
    generator = np.random.default_rng(5)
    of = np.repeat(np.arange(80), 25)
    called, spread = 0, []
    for _ in range(400):
        rows = generator.normal(size=80)[of] + generator.normal(size=of.size)
        called += shuffled([wasserstein(rows)], 40, 40, 99, generator, of)[1] <= 0.05
        spread.append(rows[:1000].mean())
    assert 5 <= called <= 37, "5 % of 400 are 20; fewer or more than that is one in 10,000"
    anew = drawn([lambda first, _: float(first @ rows / first.sum())], 40, 40, generator, of)
    assert 0.6 < anew.std() / np.std(spread) < 1.5


def test_a_request_per_row_is_drawn_as_the_rows_are() -> None:
    measures = [wasserstein(np.random.default_rng(6).normal(size=300))]
    for ask in (
        lambda *of: shuffled(measures, 200, 100, 99, np.random.default_rng(1), *of)[1],
        lambda *of: drawn(measures, 200, 100, np.random.default_rng(1), *of).sum(),
    ):
        assert ask() == ask(np.arange(300))
