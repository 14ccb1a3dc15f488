"""Statistics that may be looked at after every request, and are never wrong more often than they say.

Everything here is an *e-process*: a running score `E` that starts at 1 and, as long as a hypothesis holds, is expected
never to exceed 1, whenever one stops to look. By Ville's inequality it then reaches `1/alpha` with chance at most
`alpha`, over all looks together. So "E >= 1/alpha" rejects the hypothesis, without a correction for looking.
All scores are kept as natural logarithms. All functions broadcast over NumPy arrays, so that a simulation runs
thousands of rollouts through the very code that judges one.

Notation: of `n_c` requests to the candidate `k_c` were events (errors, slow), of `n_s` to the stable version `k_s`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

# Ratios of the rates that an alarm bets on, log-spaced: from hardly worse to "the stable version never fails".
ALARM_RATIOS: tuple[float, ...] = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
_SKIP = 0.01  # share of the stake that is never risked, so that one bad moment cannot cost more than ln(0.01)
_TINY = 1e-12
_BISECTIONS = 34  # of an interval shorter than 1: 6e-11, below anything that counts here


@dataclass(frozen=True)
class Margin:
    """What is tolerated: a candidate's rate below `ratio` x the stable version's rate + `shift`."""

    ratio: float = 1.0
    shift: float = 0.0

    def times(self, factor: float) -> Margin:
        """The margin, `factor` times as wide."""
        return Margin(1.0 + (self.ratio - 1.0) * factor, min(self.shift * factor, 0.5))

    def beyond(self, rate_s: ArrayLike) -> Array:
        """The smallest rate of the candidate that is no longer tolerated."""
        return self.ratio * np.asarray(rate_s, dtype=float) + self.shift


def factors(rungs: int, widest: float = 4.0) -> tuple[float, ...]:
    """How much wider than the final margin each of `rungs` stages' is: from `widest` to 1, in equal proportions."""
    return tuple(widest ** (1.0 - rung / (rungs - 1)) for rung in range(rungs)) if rungs > 1 else (1.0,) * rungs


def log_mean_exp(log_scores: ArrayLike) -> Array:
    """The logarithm of the scores' mean along the last axis: an average of e-processes is an e-process."""
    scores = np.asarray(log_scores, dtype=float)
    top = scores.max(axis=-1)
    return np.asarray(top + np.log(np.exp(scores - top[..., None]).mean(axis=-1)), dtype=float)


def alarm_step(n_c: ArrayLike, k_c: ArrayLike, n_s: ArrayLike, k_s: ArrayLike) -> Array:
    """What one tick adds to the log scores against "the candidate's rate is no higher", for each of `ALARM_RATIOS`.

    Conditional on all events of the tick, each is the candidate's with odds n_c : n_s, whatever the common rate is:
    so an incident that hits both versions is no evidence. Binomial likelihood ratio of Lindon and Malek, "Anytime-valid
    inference for multinomial count data", NeurIPS 2022. For requests that fail independently the condition makes
    `k_c` hypergeometric, which is less spread than binomial (Hoeffding 1963): the score is then conservative.
    """
    n_c, k_c, n_s, k_s = (np.asarray(value, dtype=float)[..., None] for value in (n_c, k_c, n_s, k_s))
    ratios = np.asarray(ALARM_RATIOS)
    both = np.maximum(n_c + n_s, 1.0)
    # The ratio is bounded below by 1 for n_c = n_s = 0, where there are no events either.
    spread = np.log(both) - np.log(np.maximum(n_c * ratios + n_s, 1.0))
    return np.asarray(k_c * np.log(ratios) + (k_c + k_s) * spread, dtype=float)


def project(
    theta_c: ArrayLike, theta_s: ArrayLike, n_c: ArrayLike, n_s: ArrayLike, ratio: ArrayLike, shift: ArrayLike
) -> tuple[Array, Array]:
    """The pair of rates on the margin that is hardest to tell from (theta_c, theta_s) with n_c and n_s requests.

    The point x_c = ratio x_s + shift that minimises n_c KL(theta_c, x_c) + n_s KL(theta_s, x_s): the reverse
    information projection of Turner, Ly and Grünwald, "Generic e-variables for exact sequential k-sample tests", 2024.
    `theta_c` must lie within the margin. Found by bisection of the derivative, which falls.
    """
    theta_c, theta_s, n_c, n_s, ratio, shift = np.broadcast_arrays(
        *(np.asarray(value, dtype=float) for value in (theta_c, theta_s, n_c, n_s, ratio, shift))
    )
    low = np.maximum((theta_c - shift) / ratio, 0.0)
    high = np.minimum(theta_s, (1.0 - shift) / ratio)
    for _ in range(_BISECTIONS):
        x_s = 0.5 * (low + high)
        x_c = ratio * x_s + shift
        rising = ratio * n_c * (theta_c - x_c) * x_s * (1.0 - x_s) + n_s * (theta_s - x_s) * x_c * (1.0 - x_c) > 0
        low, high = np.where(rising, x_s, low), np.where(rising, high, x_s)
    x_s = np.clip(0.5 * (low + high), _TINY, 1.0 - _TINY)
    return np.clip(ratio * x_s + shift, _TINY, 1.0 - _TINY), x_s


def _log_ratio(n: Array, k: Array, theta: Array, x: Array) -> Array:
    return np.asarray(k * np.log(theta / x) + (n - k) * np.log((1.0 - theta) / (1.0 - x)), dtype=float)


def pass_step(
    n_c: ArrayLike,
    k_c: ArrayLike,
    n_s: ArrayLike,
    k_s: ArrayLike,
    rate: ArrayLike,
    ratio: ArrayLike,
    shift: ArrayLike,
    temper: ArrayLike = 1.0,
) -> Array:
    """What one tick adds to the log score against "the candidate's rate is ratio x the stable one's + shift, or more".

    The bet is that both versions have the rate `rate`, which must come from earlier ticks. The score is the likelihood
    ratio to the projection of that bet onto the margin. It is an e-variable for every pair of rates beyond the margin,
    which may change from tick to tick: the logarithm of its expectation is concave in the rates and has its maximum, 0,
    at the projection (Turner, Ly and Grünwald 2024; for convex hypotheses Turner and Grünwald, "Anytime-valid
    confidence intervals for contingency tables and beyond", 2023). Without any event it still grows, by about `shift`
    for each request of the candidate. `temper` >= 1 divides the logarithm, which keeps it an e-variable (Jensen).
    """
    n_c, k_c, n_s, k_s, rate = (np.asarray(value, dtype=float) for value in (n_c, k_c, n_s, k_s, rate))
    x_c, x_s = project(rate, rate, n_c, n_s, ratio, shift)
    step = (_log_ratio(n_c, k_c, rate, x_c) + _log_ratio(n_s, k_s, rate, x_s)) / np.asarray(temper, dtype=float)
    return np.asarray(np.logaddexp(np.log1p(-_SKIP) + step, np.log(_SKIP)), dtype=float)


def share_above(n: ArrayLike, k: ArrayLike, bound: ArrayLike) -> Array:
    """The log score against "the share of events is at most `bound`", after `k` events of `n`.

    Likelihood ratio averaged over a uniform prior on (bound, 1): Robbins, "Statistical methods related to the law of
    the iterated logarithm", 1970. Depends on the totals alone.
    """
    n, k, bound = (np.asarray(value, dtype=float) for value in (n, k, bound))
    tail = np.asarray(special.betaincc(k + 1.0, n - k + 1.0, bound), dtype=float)
    return _mixture(n, k, bound, tail, 1.0 - bound)


def share_below(n: ArrayLike, k: ArrayLike, bound: ArrayLike) -> Array:
    """The log score against "the share of events is at least `bound`"; as `share_above`, the prior on (0, bound)."""
    n, k, bound = (np.asarray(value, dtype=float) for value in (n, k, bound))
    tail = np.asarray(special.betainc(k + 1.0, n - k + 1.0, bound), dtype=float)
    return _mixture(n, k, bound, tail, bound)


def _mixture(n: Array, k: Array, bound: Array, tail: Array, width: Array) -> Array:
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail)  # minus infinity where the likelihood has nothing on that side: no evidence at all
    marginal = special.betaln(k + 1.0, n - k + 1.0) + log_tail - np.log(width)
    return np.asarray(marginal - (k * np.log(bound) + (n - k) * np.log1p(-bound)), dtype=float)


def share_differs(n: ArrayLike, k: ArrayLike, share: ArrayLike) -> Array:
    """The log score against "each of n requests goes to the candidate with chance `share`"; a uniform prior."""
    n, k, share = (np.asarray(value, dtype=float) for value in (n, k, share))
    return np.asarray(
        special.betaln(k + 1.0, n - k + 1.0) - k * np.log(share) - (n - k) * np.log1p(-share), dtype=float
    )


def difference_interval(n_c: float, k_c: float, n_s: float, k_s: float, alpha: float) -> tuple[float, float]:
    """The differences of the two rates (candidate's less stable version's) that the totals do not rule out.

    Those whose likelihood is within a factor `1/alpha`, and the price of having estimated two rates, of the best one:
    what the scores above come to when nothing is known beforehand (Krichevsky and Trofimov 1981). For people to read;
    verdicts are made from the scores. (-1, 1) where a version had no request.
    """
    if n_c <= 0 or n_s <= 0:
        return -1.0, 1.0
    p_c, p_s = k_c / n_c, k_s / n_s
    price = -math.log(alpha) + 0.5 * math.log1p(k_c + k_s)
    return _limit(n_c, p_c, n_s, p_s, price, -1.0), _limit(n_c, p_c, n_s, p_s, price, 1.0)


def _limit(n_c: float, p_c: float, n_s: float, p_s: float, price: float, end: float) -> float:
    """The furthest difference towards `end` whose log likelihood is at most `price` below the best."""
    inner, outer = p_c - p_s, end
    for _ in range(30):
        middle = 0.5 * (inner + outer)
        # A lower limit is an upper one with the versions' parts exchanged.
        a = (n_c, p_c, n_s, p_s) if end > 0 else (n_s, p_s, n_c, p_c)
        if _distance(*a, abs_shift := middle if end > 0 else -middle) <= price or abs_shift <= a[1] - a[3]:
            inner = middle
        else:
            outer = middle
    return float(inner)


def _distance(n_c: float, p_c: float, n_s: float, p_s: float, shift: float) -> float:
    """How far the log likelihood falls when the rates are made to differ by `shift` (> p_c - p_s).

    The best such rates are a root of a cubic: Miettinen and Nurminen, "Comparative analysis of two rates", 1985.
    """
    n, k = n_c + n_s, n_c * p_c + n_s * p_s
    a = ((n_c + 2.0 * n_s) * shift - n - k) / n
    b = ((n_s * shift - n - 2.0 * n_s * p_s) * shift + k) / n
    c = n_s * p_s * shift * (1.0 - shift) / n
    q = a**3 / 27.0 - a * b / 6.0 + c / 2.0
    p = math.copysign(math.sqrt(max(a * a / 9.0 - b / 3.0, _TINY**2)), q)
    angle = (math.pi + math.acos(min(max(q / p**3, -1.0), 1.0))) / 3.0
    x = min(max(2.0 * p * math.cos(angle) - a / 3.0, 0.0, -shift), 1.0, 1.0 - shift)
    return _kl(n_c, p_c, x + shift) + _kl(n_s, p_s, x)


def _kl(n: float, p: float, x: float) -> float:
    x = min(max(x, _TINY), 1.0 - _TINY)
    event = p * math.log(p / x) if p > 0.0 else 0.0
    none = (1.0 - p) * math.log((1.0 - p) / (1.0 - x)) if p < 1.0 else 0.0
    return n * (event + none)


def more_missing(rows_c: int, missing_c: int, rows_s: int, missing_s: int) -> float:
    """The chance of so many missing values in the candidate's rows, were both versions alike (Fisher, one-sided)."""
    both = missing_c + missing_s
    if both == 0 or rows_c <= 0 or rows_s <= 0:
        return 1.0
    count = np.arange(missing_c, min(both, rows_c) + 1, dtype=float)
    ways = _log_choose(rows_c, count) + _log_choose(rows_s, both - count) - _log_choose(rows_c + rows_s, both)
    return min(float(np.exp(special.logsumexp(ways))), 1.0)


def _log_choose(n: float, k: ArrayLike) -> Array:
    k = np.asarray(k, dtype=float)
    return np.asarray(special.gammaln(n + 1.0) - special.gammaln(k + 1.0) - special.gammaln(n - k + 1.0), dtype=float)


def dispersion(squares: ArrayLike, variance: ArrayLike) -> Array:
    """How much more the events vary than independent ones would: 1 for independent, about c for clusters of c.

    `squares` are summed squared deviations of the candidate's share of the events from its expectation, `variance`
    what independent events would give. A prior worth ten units of variance holds it at 1 until there is more to see.
    """
    value = (np.asarray(squares, dtype=float) + 10.0) / (np.asarray(variance, dtype=float) + 10.0)
    return np.asarray(np.clip(value, 1.0, 50.0), dtype=float)


def share_interval(n: float, k: float, alpha: float) -> tuple[float, float]:
    """The shares that `share_differs` does not rule out at any look: a confidence sequence at 1 - alpha."""
    if n <= 0:
        return 0.0, 1.0
    price = -math.log(alpha) - math.lgamma(k + 1.0) - math.lgamma(n - k + 1.0) + math.lgamma(n + 2.0)

    def edge(outer: float) -> float:
        inner = k / n
        for _ in range(30):
            middle = 0.5 * (inner + outer)
            share = min(max(middle, _TINY), 1.0 - _TINY)
            if -k * math.log(share) - (n - k) * math.log1p(-share) < price:
                inner = middle
            else:
                outer = middle
        return inner

    return edge(0.0), edge(1.0)
