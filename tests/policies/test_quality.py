"""Offline quality: right numbers (scikit-learn is the referee), honest intervals, and nothing passes on no evidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics

from policies.policy import Quality, Validate
from policies.quality import CUTOFF, LOSSES, Interval, by_slice, gain, level, metric, parity, quality
from policies.verdict import Verdict

NAMES = ("roc_auc", "accuracy", "f1", "log_loss", "brier", "mae", "rmse")
Floats = NDArray[np.float64]

REFEREE: dict[str, Any] = {
    "roc_auc": metrics.roc_auc_score,
    "accuracy": lambda y, a: metrics.accuracy_score(y, a >= CUTOFF),
    "f1": lambda y, a: metrics.f1_score(y, a >= CUTOFF),
    "log_loss": metrics.log_loss,
    "brier": metrics.brier_score_loss,
    "mae": metrics.mean_absolute_error,
    "rmse": metrics.root_mean_squared_error,
}


def world(rows: int, seed: int, noise_a: float = 1.0, noise_b: float = 1.0) -> tuple[Floats, Floats, Floats]:
    """Truth and two scores in (0, 1) that know it through noise of their own."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=rows)
    truth = (signal + rng.normal(size=rows) > 0.8).astype(float)
    scores = [1 / (1 + np.exp(-(signal - 0.8 + noise * rng.normal(size=rows)))) for noise in (noise_a, noise_b)]
    return truth, scores[0], scores[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_what_scikit_learn_says(name: str) -> None:
    truth, scores, _ = world(500, 1)
    assert metric(name, truth, scores) == pytest.approx(REFEREE[name](truth, scores))
    tied = np.round(scores, 1).clip(0.05, 0.95)
    assert metric(name, truth, tied) == pytest.approx(REFEREE[name](truth, tied))


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_of_the_gain_holds_the_true_gain_as_often_as_it_says(name: str) -> None:
    """Coverage of the 90 % interval over 400 draws, by the theorem's own terms: within 4.5 standard errors."""
    truth, a, b = world(400_000, 2, 0.8, 1.3)
    sign = -1 if name in LOSSES else 1
    real = sign * (metric(name, truth, a) - metric(name, truth, b))
    held = 0
    for seed in range(400):
        seen = gain(name, *world(300, 1000 + seed, 0.8, 1.3), confidence=0.9)
        held += seen.low <= real <= seen.high
    assert held / 400 == pytest.approx(0.9, abs=4.5 * math.sqrt(0.09 / 400))


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_of_the_level_holds_the_true_level_as_often_as_it_says(name: str) -> None:
    truth, a, _ = world(400_000, 3)
    real = metric(name, truth, a)
    held = 0
    for seed in range(400):
        y, scores, _ = world(300, 5000 + seed)
        seen = level(name, y, scores, confidence=0.9)
        held += seen.low <= real <= seen.high
    assert held / 400 == pytest.approx(0.9, abs=4.5 * math.sqrt(0.09 / 400))


def test_delongs_variance_is_that_of_its_definition() -> None:
    """The structural components, pair by pair (DeLong et al. 1988, equations 4 to 6)."""
    truth, a, b = world(120, 4)
    yes, no = truth > 0, truth == 0

    def components(scores: Floats) -> tuple[Floats, Floats]:
        wins = np.sign(scores[yes][:, None] - scores[no][None, :]) / 2 + 0.5
        return wins.mean(axis=1), wins.mean(axis=0)

    (v10_a, v01_a), (v10_b, v01_b) = components(a), components(b)
    variance = (v10_a - v10_b).var(ddof=1) / yes.sum() + (v01_a - v01_b).var(ddof=1) / no.sum()
    seen = gain("roc_auc", truth, a, b, 0.95)
    from scipy import stats

    assert (seen.high - seen.low) / 2 == pytest.approx(stats.t.ppf(0.975, 119) * math.sqrt(variance))


@pytest.mark.parametrize("name", NAMES)
def test_a_version_that_answers_the_same_passes_and_one_that_guesses_fails(name: str) -> None:
    truth, scores, _ = world(4000, 5, 0.3)
    rules = Quality(metric=name, margin=0.02)  # type: ignore[arg-type]
    assert quality(rules, truth, scores, scores).verdict is Verdict.PASS
    guesses = np.random.default_rng(6).permutation(scores)
    report = quality(rules, truth, guesses, scores)
    assert report.verdict is Verdict.FAIL
    assert report.high is not None
    assert report.high < -0.02
    assert quality(rules, truth, scores, guesses).verdict is Verdict.PASS, "a gain is not a difference in size"


def test_a_good_version_on_few_rows_is_neither_passed_nor_failed_and_told_how_many_it_needs() -> None:
    truth, a, b = world(200, 7)
    report = quality(Quality(margin=0.001), truth, a, b)
    assert report.verdict is Verdict.HOLD
    assert "rows, if the estimate stays" in report.needs


def _nothing() -> dict[str, tuple[Any, Any, Any, Verdict, str]]:
    truth, a, b = world(400, 8)
    nan = a.copy()
    nan[3] = math.nan
    infinite = a.copy()
    infinite[3] = math.inf
    broken_champion = b.copy()
    broken_champion[:60] = math.nan
    return {
        "no rows": ([], [], [], Verdict.HOLD, "no validation rows"),
        "no baseline": (truth, a, None, Verdict.ERROR, "no baseline"),
        "a NaN prediction": (truth, nan, b, Verdict.FAIL, "no finite prediction on 1 of 400"),
        "an infinite prediction": (truth, infinite, b, Verdict.FAIL, "no finite prediction on 1 of 400"),
        "all NaN": (truth, np.full(400, math.nan), b, Verdict.FAIL, "no finite prediction on 400"),
        "a champion that fails on many rows": (truth, a, broken_champion, Verdict.ERROR, "answered 340 of 400"),
        "answers missing": (truth, a[:-1], b, Verdict.ERROR, "399 answers for 400 rows"),
        "champion's answers missing": (truth, a, b[:-1], Verdict.ERROR, "no baseline"),
        "one class only": (np.zeros(400), a, b, Verdict.HOLD, "0 rows of the smaller class"),
        "labels of three classes": (truth * 2, a, b, Verdict.ERROR, "needs labels 0 and 1; there is 2"),
        "a label that is missing": (
            np.where(np.arange(400) == 3, math.nan, truth),
            a,
            b,
            Verdict.ERROR,
            "label is not",
        ),
        "few rows": (truth[:20], a[:20], b[:20], Verdict.HOLD, "20 rows are too few"),
    }


@pytest.mark.parametrize("case", _nothing())
def test_no_evidence_never_passes(case: str) -> None:
    truth, a, b, verdict, says = _nothing()[case]
    report = quality(Quality(margin=1.0), truth, a, b)
    assert (report.verdict, says in report.says) == (verdict, True), report.says


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    truth=st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=60),
    scores=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60),
    champion=st.none() | st.lists(st.floats(0, 1), max_size=60),
    first=st.booleans(),
)
def test_whatever_comes_a_pass_has_finite_numbers_behind_it(
    name: str, truth: list[float], scores: list[float], champion: list[float] | None, first: bool
) -> None:
    report = quality(Quality(metric=name), truth, scores, champion, first=first)  # type: ignore[arg-type]
    if report.verdict is Verdict.PASS:
        assert report.n >= 1
        assert report.estimate is not None
        assert math.isfinite(report.estimate)
        assert np.isfinite(scores).all()


def test_a_first_version_passes_without_a_baseline_only_as_far_as_the_minimum_lets_it() -> None:
    truth, a, _ = world(4000, 9, 0.3)
    assert quality(Quality(), truth, a, None, first=True).verdict is Verdict.PASS
    value = metric("roc_auc", truth, a)
    for minimum, verdict in ((value - 0.1, Verdict.PASS), (value, Verdict.HOLD), (value + 0.1, Verdict.FAIL)):
        assert quality(Quality(minimum=minimum), truth, a, None, first=True).verdict is verdict
    loss = metric("brier", truth, a)
    for maximum, verdict in ((loss + 0.1, Verdict.PASS), (loss, Verdict.HOLD), (loss - 0.1, Verdict.FAIL)):
        rules = Quality(metric="brier", minimum=maximum)
        assert quality(rules, truth, a, None, first=True).verdict is verdict


def test_a_champion_below_the_minimum_is_no_excuse() -> None:
    truth, a, b = world(4000, 10)
    assert quality(Quality(minimum=0.99), truth, a, b).verdict is Verdict.FAIL


def test_rows_on_which_the_champion_failed_are_left_out_and_told() -> None:
    truth, a, b = world(4000, 11, 0.3, 1.5)
    b[:40] = math.nan
    report = quality(Quality(), truth, a, b)
    assert report.verdict is Verdict.PASS
    assert report.n == 3960
    assert "40 rows left out" in report.says


def test_no_difference_in_a_few_rows_is_no_proof_of_none() -> None:
    """Two perfect rankings have DeLong variance 0; with 20 of a class that must not count as certainty."""
    truth = np.repeat([0.0, 1.0], [200, 20])
    seen = gain("roc_auc", truth, truth * 0.5 + 0.1, truth * 0.8, 0.95)
    assert (seen.estimate, seen.low < -0.1) == (0.0, True)
    assert gain("roc_auc", truth, truth, truth, 0.95) == Interval(0.0, 0.0, 0.0), "the same answers are the same"


def test_a_slice_that_got_worse_fails_though_the_whole_is_fine_and_small_ones_are_only_reported() -> None:
    truth, a, b = world(9000, 12, 0.3, 1.0)
    origin = np.array(["EWR"] * 6000 + ["JFK"] * 2900 + ["LGA"] * 100)
    ruined = a.copy()
    ruined[6000:8900] = np.random.default_rng(13).permutation(a[6000:8900])
    checks = Validate(slices=("origin",), slice_margin=0.05, slice_rows_min=200)
    assert quality(checks.quality, truth, ruined[:6000].tolist() + a[6000:].tolist(), b).verdict is Verdict.PASS
    judged, reported = by_slice(checks, truth, ruined, b, {"origin": origin.tolist()})
    assert {r.gate: r.verdict for r in judged} == {
        "quality[origin=EWR]": Verdict.PASS,
        "quality[origin=JFK]": Verdict.FAIL,
    }
    assert [(r.gate, r.verdict, r.n) for r in reported] == [("quality[origin=LGA]", Verdict.HOLD, 100)]


def test_many_slices_do_not_make_a_good_version_fail() -> None:
    """An A/A comparison in 40 slices of 250 rows, 25 times: no more than the 5 % of the confidence, over all slices."""
    failed = 0
    checks = Validate(slices=("g",), slice_margin=0.01, slice_rows_min=200)
    for seed in range(25):
        truth, a, b = world(10_000, 100 + seed)
        judged, _ = by_slice(checks, truth, a, b, {"g": [str(i % 40) for i in range(10_000)]})
        failed += any(report.verdict is Verdict.FAIL for report in judged)
    assert failed <= 4  # 25 draws of 5 %: more has a chance of 0.7 %


def test_slices_without_a_baseline_are_reported() -> None:
    truth, a, _ = world(1000, 14)
    judged, reported = by_slice(Validate(slices=("g",)), truth, a, None, {"g": ["x", "y"] * 500})
    assert (judged, [report.n for report in reported]) == ((), [500, 500])


@pytest.mark.parametrize(
    ("expected", "seen", "verdict"),
    [
        ([0.1, 0.2], [0.1, 0.20009], Verdict.PASS),
        ([0.1, 0.2], [0.1, 0.2002], Verdict.FAIL),
        ([1000.0], [1000.05], Verdict.PASS),
        ([1000.0], [1000.2], Verdict.FAIL),
        ([0.1, 0.2], [0.1, math.nan], Verdict.FAIL),
        ([0.1, math.nan], [0.1, 0.2], Verdict.ERROR),
        ([0.1, 0.2], [0.1], Verdict.HOLD),
        ([], [], Verdict.HOLD),
    ],
)
def test_parity_passes_only_answers_within_the_tolerance(
    expected: list[float], seen: list[float], verdict: Verdict
) -> None:
    assert parity(expected, seen, 1e-4).verdict is verdict
