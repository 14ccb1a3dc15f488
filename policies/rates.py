"""Two versions' rates of an event compared tick by tick: what is known so far, as values that add up.

A `Rates` holds the scores of one comparison over a whole rollout. Each field is a number (or a tuple of numbers) for
one rollout; arrays with leading axes go through the same functions for thousands of simulated ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from policies import stats
from policies.stats import Margin

CONFIDENCE = 0.95  # of "no worse than the margin"
_PRIOR_N, _PRIOR_K = 50.0, 0.25  # what is believed of the common rate before the first request: half a percent
ONE_LOOK = 1.0  # the most that the most telling tick may add to a log score for "worse"
_MEMORY = 1000.0  # requests that the running guess of the common rate remembers, but five ticks at least


@dataclass(frozen=True)
class Rates:
    """The comparison so far. `*_c` belongs to the candidate, `*_s` to the stable version.

    `n_*`, `k_*`: requests and events since the start; `stage_*` since the stage began. `alarm*`: log scores for "the
    candidate is worse", one per ratio; `peak*` the most that a single tick added to each; `banked` the sum of the ended
    stages' scores. `passed*`: log scores for "no worse than the stage's margin", one per stage. `recent_*`: the running
    guess of the common rate.
    `squares`, `variance`: how clustered the events are.
    """

    alarm: Any
    passed: Any
    alarm_stage: Any
    peak: Any
    peak_stage: Any
    passed_stage: Any = 0.0
    banked: Any = 0.0
    n_c: Any = 0.0
    k_c: Any = 0.0
    n_s: Any = 0.0
    k_s: Any = 0.0
    stage_n_c: Any = 0.0
    stage_k_c: Any = 0.0
    stage_n_s: Any = 0.0
    stage_k_s: Any = 0.0
    recent_n: Any = _PRIOR_N
    recent_k: Any = _PRIOR_K
    squares: Any = 0.0
    variance: Any = 0.0


def begin(rungs: int) -> Rates:
    """Nothing is known yet; `rungs` stages will ask, the watch included."""
    zeros = (0.0,) * len(stats.ALARM_RATIOS)
    return Rates(alarm=zeros, alarm_stage=zeros, peak=zeros, peak_stage=zeros, passed=(0.0,) * rungs)


def enter_stage(rates: Rates) -> Rates:
    """A new stage begins. Nothing is forgotten; a second set of scores starts at 1, for what begins to go wrong now."""
    return replace(
        rates,
        banked=rates.banked + _own_score(rates),
        alarm_stage=np.zeros_like(np.asarray(rates.alarm_stage)),
        peak_stage=np.zeros_like(np.asarray(rates.peak_stage)),
        passed_stage=np.zeros_like(np.asarray(rates.passed_stage)),
        stage_n_c=0.0, stage_k_c=0.0, stage_n_s=0.0, stage_k_s=0.0,
    )  # fmt: skip


def tick(
    rates: Rates, n_c: Any, k_c: Any, n_s: Any, k_s: Any, stage: Any, rungs: tuple[Margin, ...], cluster: float = 1.0
) -> Rates:
    """The comparison after `n_*` more requests with `k_*` events among them.

    `cluster` is the largest number of events that one cause makes at once; they count as one. More clustering than that
    is noticed from the earlier ticks, and the scores grow the slower for it.
    """
    n_c, k_c, n_s, k_s = (np.asarray(value, dtype=float) for value in (n_c, k_c, n_s, k_s))
    temper = np.maximum(cluster, stats.dispersion(rates.squares, rates.variance))
    alarm = stats.alarm_step(n_c, k_c, n_s, k_s) / temper[..., None]
    guess = np.clip(np.asarray(rates.recent_k) / np.asarray(rates.recent_n), 1e-6, 0.95)
    ratio = np.asarray([rung.ratio for rung in rungs])
    shift = np.asarray([rung.shift for rung in rungs])
    a, b, c, d, common, by = (value[..., None] for value in (n_c, k_c, n_s, k_s, guess, temper))
    passed = stats.pass_step(a, b, c, d, common, ratio, shift, by)
    square, variance = _spread(rates, n_c, k_c, n_s, k_s)
    keep = np.maximum(1.0 - (n_c + n_s) / _MEMORY, 0.8)
    return replace(
        rates,
        alarm=np.asarray(rates.alarm) + alarm,
        alarm_stage=np.asarray(rates.alarm_stage) + alarm,
        peak=np.maximum(rates.peak, alarm),
        peak_stage=np.maximum(rates.peak_stage, alarm),
        passed=np.asarray(rates.passed) + passed,
        passed_stage=np.asarray(rates.passed_stage) + _of_stage(passed, stage),
        n_c=rates.n_c + n_c, k_c=rates.k_c + k_c, n_s=rates.n_s + n_s, k_s=rates.k_s + k_s,
        stage_n_c=rates.stage_n_c + n_c, stage_k_c=rates.stage_k_c + k_c,
        stage_n_s=rates.stage_n_s + n_s, stage_k_s=rates.stage_k_s + k_s,
        recent_n=np.asarray(rates.recent_n) * keep + n_c + n_s,
        recent_k=np.asarray(rates.recent_k) * keep + k_c + k_s,
        squares=rates.squares + square, variance=rates.variance + variance,
    )  # fmt: skip


def _of_stage(values: Any, stage: Any) -> Any:
    """The stage's entry of the last axis; `stage` is a number, or one per rollout."""
    if isinstance(stage, int):
        return np.asarray(values)[..., stage]
    return np.take_along_axis(np.asarray(values), np.asarray(stage)[..., None], axis=-1)[..., 0]


def _spread(rates: Rates, n_c: Any, k_c: Any, n_s: Any, k_s: Any) -> tuple[Any, Any]:
    """The tick's squared deviation and variance of the candidate's share of the events, given the ratio so far."""
    rate_c = (np.asarray(rates.k_c) + 0.5) / (np.asarray(rates.n_c) + 1.0)
    rate_s = (np.asarray(rates.k_s) + 0.5) / (np.asarray(rates.n_s) + 1.0)
    known = (np.asarray(rates.n_c) > 0) & (np.asarray(rates.n_s) > 0)
    ratio = np.where(known, np.clip(rate_c / rate_s, 0.1, 100.0), 1.0)
    share = n_c * ratio / np.maximum(n_c * ratio + n_s, 1e-9)
    events = k_c + k_s
    return (k_c - events * share) ** 2, events * share * (1.0 - share)


def log_worse(rates: Rates, stages: int) -> Any:
    """The log score for "the candidate is worse", an average: half on the whole rollout, half on its `stages`, each
    with a score of its own that starts at 1.

    Of the tick that says the most, no more than `ONE_LOOK` counts, which only lowers the score: what a single look
    shows may be one cause (a retrying client, a burst), and is not believed until another look says the same.
    """
    own = np.log(np.maximum(np.asarray(rates.banked) + _own_score(rates), 1e-300)) - np.log(float(stages))
    whole = stats.log_mean_exp(_without_peak(rates.alarm, rates.peak))
    return np.logaddexp(whole, own) - np.log(2.0)


def _own_score(rates: Rates) -> Any:
    """The score of this stage alone, kept within what a number can hold."""
    return np.exp(np.minimum(stats.log_mean_exp(_without_peak(rates.alarm_stage, rates.peak_stage)), 600.0))


def _without_peak(scores: Any, peak: Any) -> Any:
    return np.asarray(scores) - np.maximum(np.asarray(peak) - ONE_LOOK, 0.0)


def log_no_worse(rates: Rates, stage: Any) -> Any:
    """The log score for "no worse than the stage's margin": half on the whole rollout, half on this stage alone."""
    return np.logaddexp(_of_stage(rates.passed, stage), rates.passed_stage) - np.log(2.0)


def beyond_half(rates: Rates, margin: Margin) -> Any:
    """Whether the candidate's rate looks worse by half of the margin or more, over the rollout or over the stage.

    What is smaller is tolerated: it may be shown beyond doubt, given traffic enough, and is still no reason to go back.
    """
    half = margin.times(0.5)
    whole = _rate(rates.k_c, rates.n_c) >= half.beyond(_rate(rates.k_s, rates.n_s))
    stage = _rate(rates.stage_k_c, rates.stage_n_c) >= half.beyond(_rate(rates.stage_k_s, rates.stage_n_s))
    return whole | stage


def _rate(k: Any, n: Any) -> Any:
    return np.asarray(k) / np.maximum(np.asarray(n), 1.0)


def growth(rate: float, weight: float, margin: Margin) -> float:
    """What one request of the candidate adds on average to the log score for "no worse", if both versions have `rate`.

    `weight` is the candidate's share of all requests.
    """
    rate = min(max(rate, 1e-6), 0.95)
    x_c, x_s = stats.project(rate, rate, weight, 1.0 - weight, margin.ratio, margin.shift)
    gain = _divergence(rate, float(x_c)) + _divergence(rate, float(x_s)) * (1.0 - weight) / weight
    return max(gain, 0.0)


def _divergence(p: float, x: float) -> float:
    return p * math.log(p / x) + (1.0 - p) * math.log((1.0 - p) / (1.0 - x))


def plain(rates: Rates) -> Rates:
    """The same with plain numbers and tuples: JSON-able."""

    def convert(value: Any) -> Any:
        array = np.asarray(value, dtype=float)
        return tuple(float(item) for item in array) if array.ndim else float(array)

    return Rates(**{name: convert(getattr(rates, name)) for name in Rates.__dataclass_fields__})
