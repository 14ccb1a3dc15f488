"""The peers' rules are what they publish, and the published failure of one of them does not happen here."""

from __future__ import annotations

import math

import numpy as np

from policies import rates
from policies.stats import Margin
from tests.benchmarks.judges import Lockgate, compare, wasserstein
from tests.benchmarks.peers import Argo, Flagger, mann_whitney
from tests.benchmarks.streams import Tick

ONES, MIXED = [1.0] * 10, [100.0] * 7 + [1.0] * 3


def test_kayenta_passes_the_canary_of_spinnaker_issue_6278() -> None:
    """Baseline ten 1s, canary seven 100s and three 1s: reported as a Pass of a plainly worse canary."""
    assert mann_whitney(np.array([MIXED]), np.array([ONES]))[0] == 0


def test_kayenta_calls_a_clear_shift_high_and_equal_points_a_pass() -> None:
    generator = np.random.default_rng(1)
    control = generator.normal(1.0, 0.1, (1, 60))
    assert mann_whitney(control + 1.0, control)[0] == 1
    assert mann_whitney(control, control)[0] == 0
    assert mann_whitney(generator.normal(1.0, 0.1, (1, 60)), control)[0] == 0
    assert mann_whitney(np.full((1, 60), np.nan), control)[0] == 0


def test_the_same_canary_fails_here() -> None:
    """The points taken as errors a minute, of 1,000 requests to each version."""
    known, ladder = rates.begin(2), (Margin(1.0, 0.005),) * 2
    for errors_c, errors_s in zip(MIXED, ONES, strict=True):
        known = rates.tick(known, 1000, errors_c, 1000, errors_s, 0, ladder)
    assert rates.log_worse(known, 2) > -math.log(0.01)
    assert rates.beyond_half(known, ladder[-1])


def minute(at: float, n: float, k: float) -> Tick:
    values = [np.array([value]) for value in (n, n, k, 0.0, 0.0, 0.0)]
    return Tick(0, at, *values)


def test_flagger_rolls_back_at_the_fifth_failed_check() -> None:
    rule = Flagger(1)
    failed_after = []
    for at in range(0, 60 * 8, 60):
        rule.tick(minute(float(at), 100, 2))
        failed_after.append(bool(rule.failed[0]))
    assert failed_after.index(True) == 5  # the sixth minute has begun: five checks have failed


def test_argo_aborts_beyond_its_failure_limit() -> None:
    lenient, strict = Argo(1, failure_limit=3), Argo(1, failure_limit=0)
    for at in range(0, 60 * 21, 60):
        for rule in (lenient, strict):
            rule.tick(minute(float(at), 100, 10))
        assert bool(strict.failed[0]) is (at >= 300)
        assert bool(lenient.failed[0]) is (at >= 1200)


def test_the_batch_judges_as_the_gates_do() -> None:
    """One rollout of a batch has the very scores of the rollout alone."""
    generator = np.random.default_rng(2)
    batch = Lockgate(3, 3, Margin(1.0, 0.01), Margin(1.0, 0.02))
    alone = rates.begin(3)
    for step in range(60):
        stage = step // 20
        counts = [generator.poisson(50, 3).astype(float) for _ in range(2)]
        events = [generator.binomial(counts[i % 2].astype(int), 0.05).astype(float) for i in range(4)]
        batch.tick(Tick(stage, float(step), counts[0], counts[1], events[0], events[1], events[2], events[3]))
        alone = rates.enter_stage(alone) if step in (20, 40) else alone
        alone = rates.tick(alone, counts[0][1], events[0][1], counts[1][1], events[1][1], stage, batch.ladders[0])
    assert np.allclose(np.asarray(batch.known[0].passed)[1], alone.passed)
    assert np.isclose(rates.log_worse(batch.known[0], 3)[1], rates.log_worse(alone, 3))


def test_the_batch_distance_is_the_normed_wasserstein_distance() -> None:
    from scipy.stats import wasserstein_distance

    generator = np.random.default_rng(3)
    first, second = generator.normal(0, 2, 400), generator.normal(0.5, 2, 300)
    assert math.isclose(wasserstein(first, second), wasserstein_distance(first, second) / np.std(first))
    assert compare(first, second, generator).p_value_max < 0.05
