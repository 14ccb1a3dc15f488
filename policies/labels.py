"""Quality once the labels come: is the candidate's mean loss higher than the stable version's, on labelled requests?

The losses lie between 0 and 1. Where both versions answered the same request, the difference of the two losses is one
observation (a pair); elsewhere each version's losses are held against the other's. Both give e-processes, of data that
do not overlap, so that their product is one: see `policies.stats`.

A bet on observations x >= -1 whose mean is 0 at most: 1 + l x, for a stake 0 < l < 1 (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", 2024). Its logarithm is at least l x - psi(l) x^2, with
psi(l) = -ln(1 - l) - l (Fan, Grama and Liu, "Exponential inequalities for martingales with applications", 2015), so
that sums and sums of squares are all that is needed. The scores for several stakes are averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policies import stats
from policies.evidence import NONE, Outcomes, Sums
from policies.faults import of_outcomes
from policies.policy import Labelled
from policies.verdict import GateReport, Verdict

Array = NDArray[np.float64]

STAKES: tuple[float, ...] = (0.01, 0.03, 0.08, 0.2, 0.45, 0.8)
CONFIDENCE = 0.95  # of "no worse than the margin"
# Variances of a loss, and of the difference of two losses of one request, where nothing is known yet: of versions that
# predict well and mostly alike. For plans and forecasts; verdicts do not use them.
SPREAD = {"brier": (0.05, 0.01), "accuracy": (0.13, 0.04)}
_PRIOR_N, _PRIOR_LOSS = 20.0, 0.15  # what is believed of the mean loss before the first label
_NOTHING = (0.0,) * len(STAKES)


@dataclass(frozen=True)
class Learned:
    """What the labels have shown since the rollout began. `worse_*` and `fine_*` are log scores, one per stake.

    `pairs` are sums of the differences (candidate's loss less the stable version's), `candidate` and `stable` sums of
    the losses on requests that only one of them answered; `last` what the source counted at the last look, and `spare`
    the losses that wait for the other version's. `in_stage` counts the candidate's labels that came in this stage.
    """

    pairs: Sums = NONE
    candidate: Sums = NONE
    stable: Sums = NONE
    spare: tuple[Sums, Sums] = (NONE, NONE)
    last: Outcomes | None = None
    in_stage: float = 0.0
    worse_pairs: Any = _NOTHING
    worse_apart: Any = _NOTHING
    fine_pairs: Any = _NOTHING
    fine_apart: Any = _NOTHING

    @property
    def rows(self) -> tuple[Any, Any]:
        """Labelled requests of the candidate and of the stable version."""
        return self.pairs.n + self.candidate.n, self.pairs.n + self.stable.n


def enter_stage(learned: Learned) -> Learned:
    """A new stage: labels must go on coming. Nothing is forgotten."""
    return replace(learned, in_stage=0.0)


# ---------------------------------------------------------------- the bets


def bet(stake: ArrayLike, total: Array, squares: Array) -> Array:
    """A lower limit of the sum of ln(1 + stake x), from the sum of the x >= -1 and of their squares."""
    stakes = np.asarray(stake, dtype=float)
    return np.asarray(stakes * total + (np.log1p(-stakes) + stakes) * np.asarray(squares, dtype=float), dtype=float)


def paired_step(more: Sums, mean: float, sign: float) -> Array:
    """What `more` differences add to the log scores against "their mean is at most `mean`" (`sign` 1), or "at least"
    (`sign` -1). A difference is from -1 to 1; x is scaled so that it is never below -1."""
    n, total, squares = (np.asarray(value, dtype=float)[..., None] for value in (more.n, more.total, more.squares))
    scale = 1.0 + sign * mean
    x = sign * (total - n * mean) / scale
    return bet(STAKES, x, (squares - 2.0 * mean * total + n * mean**2) / scale**2)


def apart_step(candidate: Sums, stable: Sums, mean: float, sign: float, centre: ArrayLike) -> Array:
    """As `paired_step`, for losses of different requests; `centre` is the common loss guessed from earlier labels.

    Each version's x is its loss less a fixed c, where the two c differ by `mean`, and the stakes are such that n times
    the stake is the same for both: then the product's expectation is at most exp(n stake (difference - mean)), since
    1 + y <= exp(y), which does not depend on the common loss.
    """
    n_c, t_c, q_c, n_s, t_s, q_s = (
        np.asarray(value, dtype=float)[..., None]
        for value in (candidate.n, candidate.total, candidate.squares, stable.n, stable.total, stable.squares)
    )
    both = np.maximum(n_c + n_s, 1.0)
    centre = np.clip(np.asarray(centre, dtype=float)[..., None], 0.5 * mean, 1.0 - 0.5 * mean)
    score = np.zeros((), dtype=float)
    sides: tuple[tuple[Any, ...], ...] = ((n_c, t_c, q_c, n_s, sign), (n_s, t_s, q_s, n_c, -sign))
    for n, total, squares, other, way in sides:
        at = centre + 0.5 * mean * way * sign
        moved = squares - 2.0 * at * total + n * at**2
        score = score + bet(np.asarray(STAKES) * other / both, way * (total - n * at), moved)
    return score


def count(learned: Learned, pairs: Sums, candidate: Sums, stable: Sums, margin: float) -> Learned:
    """What is known with so many more labels. Sums may hold arrays, for many rollouts at once.

    Losses of one version alone wait until the other has some, too.
    """
    spare = learned.spare[0].plus(candidate), learned.spare[1].plus(stable)
    ready = (np.asarray(spare[0].n) > 0) & (np.asarray(spare[1].n) > 0)
    block = spare[0].where(ready), spare[1].where(ready)
    before = learned.candidate.plus(learned.stable)
    centre = (before.total + _PRIOR_N * _PRIOR_LOSS) / (np.asarray(before.n) + _PRIOR_N)
    return replace(
        learned,
        pairs=learned.pairs.plus(pairs),
        candidate=learned.candidate.plus(block[0]),
        stable=learned.stable.plus(block[1]),
        spare=(spare[0].where(~ready), spare[1].where(~ready)),
        in_stage=learned.in_stage + pairs.n + candidate.n,
        worse_pairs=np.asarray(learned.worse_pairs) + paired_step(pairs, 0.5 * margin, 1.0),
        worse_apart=np.asarray(learned.worse_apart) + apart_step(*block, 0.5 * margin, 1.0, centre),
        fine_pairs=np.asarray(learned.fine_pairs) + paired_step(pairs, margin, -1.0),
        fine_apart=np.asarray(learned.fine_apart) + apart_step(*block, margin, -1.0, centre),
    )


def log_worse(learned: Learned) -> Any:
    """The log score for "the candidate's mean loss is higher by more than half the margin"."""
    return stats.log_mean_exp(learned.worse_pairs) + stats.log_mean_exp(learned.worse_apart)


def log_no_worse(learned: Learned) -> Any:
    """The log score for "it is not higher by the margin or more"."""
    return stats.log_mean_exp(learned.fine_pairs) + stats.log_mean_exp(learned.fine_apart)


def shown(
    pairs: float,
    candidate: float,
    stable: float,
    margin: float,
    metric: str,
    z: float = 0.0,
    alpha: float = 1.0 - CONFIDENCE,
) -> bool:
    """Whether so many pairs, and labelled rows of each alone, show with that `alpha` that a difference of 0 is below
    the margin; `z` standard deviations of bad luck included."""
    single, paired = SPREAD[metric]
    both = max(candidate + stable, 1e-9)
    even = candidate * stable / both
    by_pairs, by_rows = [0.0], [0.0]
    for stake in STAKES:
        cost = -math.log1p(-stake) - stake
        luck = z * stake * math.sqrt(pairs * paired)
        by_pairs.append(pairs * (stake * margin - cost * (paired + margin**2)) - luck)
        shares = stake * stable / both, stake * candidate / both
        costs = sum(n * (-math.log1p(-s) - s) for n, s in zip((candidate, stable), shares, strict=True))
        by_rows.append(even * stake * margin - costs * single - z * stake * math.sqrt(even * single))
    price = math.log(len(STAKES)) * ((pairs > 0) + (even > 0))
    return max(by_pairs) + max(by_rows) - price >= -math.log(alpha)


# ---------------------------------------------------------------- a look


def look(
    gate: Labelled, learned: Learned, alpha: float, asked: bool, outcomes: Outcomes | None, problem: str | None
) -> tuple[Learned, GateReport | None]:
    """Do the labels say that it is worse, or no worse? `outcomes` counts since the time that it names.

    Where the gate is not `asked` for a pass, it reports a failure or an error, and nothing else.
    """
    if problem is not None:
        return learned, GateReport("quality", Verdict.ERROR, problem)
    if outcomes is not None:
        wrong = of_outcomes(outcomes)
        if wrong:
            return learned, GateReport("quality", Verdict.ERROR, f"the labels' {wrong}")
        before = learned.last
        more = outcomes if before is None or before.since != outcomes.since else outcomes.minus(before)
        learned = replace(learned, last=outcomes)
        if min(more.pairs.n, more.candidate.n, more.stable.n) < 0:
            return learned, GateReport("quality", Verdict.HOLD, "the count of labels began anew") if asked else None
        learned = _plain(count(learned, more.pairs, more.candidate, more.stable, gate.margin))
    report = _report(gate, learned, alpha)
    return learned, report if asked or report.verdict is Verdict.FAIL else None


def _plain(learned: Learned) -> Learned:
    """The same with plain numbers and tuples: JSON-able."""

    def scores(values: Any) -> tuple[float, ...]:
        return tuple(float(score) for score in np.asarray(values))

    return replace(
        learned,
        pairs=learned.pairs.plain(),
        candidate=learned.candidate.plain(),
        stable=learned.stable.plain(),
        spare=(learned.spare[0].plain(), learned.spare[1].plain()),
        in_stage=float(learned.in_stage),
        worse_pairs=scores(learned.worse_pairs),
        worse_apart=scores(learned.worse_apart),
        fine_pairs=scores(learned.fine_pairs),
        fine_apart=scores(learned.fine_apart),
    )


def _report(gate: Labelled, learned: Learned, alpha: float) -> GateReport:
    n_c, n_s = learned.rows
    waiting = learned.last.waiting if learned.last is not None else 0
    worse, fine = float(log_worse(learned)), float(log_no_worse(learned))
    estimate, low, high = difference(learned, gate.rows_min)
    rows = min(n_c, n_s)
    verdict, needs = Verdict.HOLD, ""
    if worse >= -math.log(alpha):
        verdict = Verdict.FAIL
    elif rows < gate.rows_min or learned.in_stage <= 0:
        lacking = max(gate.rows_min - rows, 1.0)
        needs = f"{lacking:,.0f} more labelled requests of each version"
    elif fine >= -math.log(1.0 - CONFIDENCE):
        verdict = Verdict.PASS
    else:
        needs = f"about {_more(gate, learned):,.0f} more labelled requests of the candidate"
    if needs and waiting:
        needs += f"; {waiting:,} of its answers still lack their label"
    unit = f"difference of the mean loss ({gate.metric})"
    if n_c <= 0 or n_s <= 0:
        says = "no labels of both versions yet"
    else:
        says = f"{gate.metric} loss {estimate:+.4f} against the stable version's (n {n_c:,.0f}): " + {
            Verdict.PASS: f"no worse by {gate.margin:g}",
            Verdict.FAIL: f"worse by more than half the margin of {gate.margin:g}; chance that this is an accident: "
            f"below {alpha:.2g}",
        }.get(verdict, f"{gate.margin:g} worse is not ruled out yet")
    return GateReport(
        gate="quality", verdict=verdict, says=says, statistic=math.exp(min(worse, 600.0)), estimate=estimate,
        low=low, high=high, n=int(n_c), threshold=gate.margin, unit=unit, needs=needs,
    )  # fmt: skip


def _more(gate: Labelled, learned: Learned) -> float:
    """How many more labelled requests of the candidate it may take, were both versions alike: doubled until enough."""
    n_c, n_s = learned.rows
    share = (learned.pairs.n / n_c) if n_c else 0.0
    more = 1.0
    while more < 1e9:
        total = n_c + more
        if shown(
            total * share, total * (1 - share), total * (1 - share) * n_s / max(n_c, 1.0), gate.margin, gate.metric
        ):
            break
        more *= 1.5
    return more


def difference(learned: Learned, tuned: float) -> tuple[float, float, float]:
    """The difference of the mean losses with its 95 % interval over all looks; (0, -1, 1) without labels of both.

    Robbins' normal mixture, tuned to so many rows, with the variance estimated (Waudby-Smith, Arbour, Sinha, Kennedy
    and Ramdas, "Time-uniform central limit theory", 2024). For people to read; verdicts are made from the scores.
    """
    found: list[tuple[float, float]] = []
    if learned.pairs.n >= 2:
        found.append((learned.pairs.mean, _variance(learned.pairs) / learned.pairs.n))
    if min(learned.candidate.n, learned.stable.n) >= 2:
        c, s = learned.candidate, learned.stable
        found.append((c.mean - s.mean, _variance(c) / c.n + _variance(s) / s.n))
    if not found:
        return 0.0, -1.0, 1.0
    weight = sum(1.0 / variance for _, variance in found)
    estimate = sum(mean / variance for mean, variance in found) / weight
    times = min(learned.rows) / tuned
    wide = math.sqrt((1.0 + 1.0 / times) * (math.log1p(times) - 2.0 * math.log(1.0 - CONFIDENCE)) / weight)
    return estimate, max(estimate - wide, -1.0), min(estimate + wide, 1.0)


def _variance(sums: Sums) -> float:
    """Of one observation; one more of each extreme is imagined, so that it is never 0."""
    return float(max(sums.squares / sums.n - sums.mean**2, 0.0) + 1.0 / (sums.n + 2.0))
