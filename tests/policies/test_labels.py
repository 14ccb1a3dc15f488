"""Quality by labels: never wrong more often than it says, whoever looks; what it needs is what it then takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from policies import gates, labels
from policies.evidence import NONE, Counts, Evidence, Outcomes, Sums
from policies.labels import Learned
from policies.policy import Labelled, Policy
from policies.policy_yaml import parse
from policies.verdict import GateReport, Verdict

ROLLOUTS, LOOKS = 1500, 60
POLICY = parse(
    """
policy: labelled
rollout:
  burn_in: 0s
  stages:
    - shadow: {share: 1.0, for: 60s}
    - canary: {weight: 50, for: 60s}
  gates:
    errors: null
    quality: {margin: 0.02, rows_min: 100}
"""
)


def sums(values: np.ndarray, where: np.ndarray | None = None) -> Sums:
    """The last axis added up."""
    kept = np.ones_like(values) if where is None else where.astype(float)
    return Sums(kept.sum(-1), (values * kept).sum(-1), (values**2 * kept).sum(-1))


def blank(rollouts: int = ROLLOUTS) -> Learned:
    zeros = np.zeros((rollouts, len(labels.STAKES)))
    return Learned(worse_pairs=zeros, worse_apart=zeros, fine_pairs=zeros, fine_apart=zeros)


def simulate(worse: float, margin: float, paired: bool, seed: int = 3, n: int = 40) -> tuple[float, float]:
    """(rolled back, shown no worse) at any of the looks, of candidates whose errors are `worse` more than 10 %.

    Most of the errors are common to both versions on the same request; otherwise each look has about n requests.
    """
    generator = np.random.default_rng(seed)
    learned = blank()
    bad, fine = np.zeros(ROLLOUTS, bool), np.zeros(ROLLOUTS, bool)
    for _ in range(LOOKS):
        if paired:
            chance = generator.random((ROLLOUTS, n))
            fresh = generator.random((ROLLOUTS, n))
            loss_s = np.where(chance < 0.8, fresh < 0.1, generator.random((ROLLOUTS, n)) < 0.1)
            loss_c = np.where(chance < 0.8, fresh < 0.1 + worse, generator.random((ROLLOUTS, n)) < 0.1 + worse)
            pairs, candidate, stable = sums(loss_c.astype(float) - loss_s), NONE, NONE
        else:
            had = generator.random((ROLLOUTS, n)) < 0.3  # about; at some looks one version has none
            loss_c = (generator.random((ROLLOUTS, n)) < 0.1 + worse).astype(float)
            loss_s = (generator.random((ROLLOUTS, n)) < 0.1).astype(float)
            pairs, candidate, stable = NONE, sums(loss_c, had), sums(loss_s, ~had)
        learned = labels.count(learned, pairs, candidate, stable, margin)
        bad |= labels.log_worse(learned) >= np.log(20)
        fine |= labels.log_no_worse(learned) >= np.log(20)
    return float(bad.mean()), float(fine.mean())


@pytest.mark.parametrize("paired", [True, False])
def test_within_half_the_margin_an_alarm_is_as_rare_as_promised(paired: bool) -> None:
    """Ville: over all looks together at most 5 %, for a candidate that is exactly at half the margin."""
    assert simulate(0.03, 0.06, paired)[0] <= 0.05


@pytest.mark.parametrize("paired", [True, False])
def test_at_the_margin_a_pass_is_as_rare_as_promised(paired: bool) -> None:
    assert simulate(0.06, 0.06, paired)[1] <= 0.05


@pytest.mark.parametrize("paired", [True, False])
def test_a_clear_loss_is_seen_and_an_equal_version_passes(paired: bool) -> None:
    assert simulate(0.2, 0.06, paired)[0] >= 0.95
    assert simulate(0.0, 0.12 if not paired else 0.06, paired)[1] >= 0.95


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("low", [True, False])
def test_each_single_bet_is_fair_for_the_most_extreme_losses(sign: float, low: bool) -> None:
    """The expectation of the score's factor is at most 1 exactly at the margin, summed over all outcomes."""
    mean = 0.3
    p_s = 0.05 if low else 0.6
    for stake in range(len(labels.STAKES)):
        expected = 0.0
        for l_c, l_s in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
            chance = abs(1 - l_c - (p_s + mean)) * abs(1 - l_s - p_s)
            one = [Sums(1.0, value, value**2) for value in (l_c, l_s)]
            expected += chance * float(np.exp(labels.apart_step(one[0], one[1], mean, sign, 0.2)[stake]))
        assert expected <= 1.0 + 1e-9
        pairs = ((1.0, 0.5), (0.0, 0.3), (-1.0, 0.2))
        factors = [c * np.exp(labels.paired_step(Sums(1.0, d, d * d), mean, sign)[stake]) for d, c in pairs]
        assert sum(factors) <= 1.0 + 1e-9


# ---------------------------------------------------------------- in a rollout


def outcomes(n: int, worse: float = 0.0, waiting: int = 0, since: float = 0.0) -> Outcomes:
    """So many pairs, of which `worse` are wrong where the stable version is right, and 1 % each way besides."""
    more, less = 0.01 * n + worse * n, 0.01 * n
    return Outcomes(since, pairs=Sums(n, more - less, more + less), waiting=waiting)


def look(policy: Policy, stages: list[tuple[int, Outcomes | None]]) -> tuple[gates.State, list[GateReport | None]]:
    state, said = gates.begin(policy), []
    for at, (stage, seen) in enumerate(stages):
        evidence = Evidence(100.0 + at, Counts(100, 0), Counts(100, 0), outcomes=seen)
        state, reports = gates.look(policy, stage, state, evidence)
        state = gates.State.from_dict(json.loads(json.dumps(asdict(state))))
        said.append(next((report for report in reports if report.gate == "quality"), None))
    return state, said


def test_it_is_asked_for_a_pass_in_the_last_stage_only() -> None:
    _, said = look(POLICY, [(0, outcomes(1000)), (0, outcomes(3000)), (1, outcomes(4000)), (2, outcomes(4100))])
    assert said[0] is None
    assert said[1] is None
    assert said[2] is not None
    assert said[2].verdict is Verdict.PASS
    assert said[3] is None


def test_it_fails_in_any_stage() -> None:
    for stage in (0, 1, 2):
        _, said = look(POLICY, [(stage, outcomes(4000, worse=0.06))])
        assert said[0] is not None
        assert said[0].verdict is Verdict.FAIL


def test_where_it_is_not_required_it_never_holds_anything_up() -> None:
    policy = parse(
        "policy: a\nrollout: {stages: [{canary: {weight: 9, for: 9s}}], gates: {quality: {required: false}}}"
    )
    _, said = look(policy, [(0, None), (1, outcomes(10))])
    assert said == [None, None]


def test_labels_that_lag_are_a_hold_that_says_how_many_are_missing() -> None:
    _, said = look(POLICY, [(1, outcomes(30, waiting=5000))])
    assert said[0] is not None
    assert said[0].verdict is Verdict.HOLD
    assert said[0].needs == "70 more labelled requests of each version; 5,000 of its answers still lack their label"


def test_no_labels_at_all_never_pass() -> None:
    _, said = look(POLICY, [(1, None), (1, outcomes(0)), (1, outcomes(0))])
    assert {report.verdict for report in said if report is not None} == {Verdict.HOLD}
    assert len(said) == 3


def test_the_labels_of_the_stage_before_do_not_pass_this_one() -> None:
    _, said = look(POLICY, [(0, outcomes(4000)), (1, outcomes(4000)), (1, outcomes(4001))])
    assert [report.verdict for report in said[1:] if report] == [Verdict.HOLD, Verdict.PASS]


def test_a_controller_that_begins_anew_adds_to_what_was_known_and_counts_nothing_twice() -> None:
    state, _ = look(POLICY, [(0, outcomes(1000)), (0, outcomes(50, since=9.0)), (0, outcomes(70, since=9.0))])
    assert state.learned.pairs.n == 1070
    state, said = look(POLICY, [(1, outcomes(1000)), (1, outcomes(50)), (1, outcomes(60))])
    assert state.learned.pairs.n == 1010
    assert said[1] is not None
    assert said[1].verdict is Verdict.HOLD


@pytest.mark.parametrize(
    "broken",
    [
        Sums(10, float("nan"), 1.0),
        Sums(10, 11.0, 11.0),
        Sums(-1, 0.0, 0.0),
        Sums(10, 5.0, 0.1),
        Sums(10, 1.0, float("inf")),
        Sums(10.5, 1.0, 1.0),
    ],
)
def test_sums_that_cannot_be_true_are_an_error(broken: Sums) -> None:
    for name in ("pairs", "candidate", "stable"):
        _, said = look(POLICY, [(1, replace(outcomes(5000), **{name: broken}))])
        assert said[0] is not None
        assert said[0].verdict is Verdict.ERROR


def test_losses_of_one_version_alone_wait_for_the_other_s() -> None:
    gate = Labelled(margin=0.05, rows_min=20)
    learned, _ = labels.look(gate, Learned(), 0.05, True, Outcomes(0.0, candidate=Sums(500, 50.0, 50.0)), None)
    assert learned.candidate.n == 0
    both = Outcomes(0.0, candidate=Sums(500, 50.0, 50.0), stable=Sums(500, 50.0, 50.0))
    learned, _ = labels.look(gate, learned, 0.05, True, both, None)
    assert learned.rows == (500, 500)
    assert labels.log_no_worse(learned) > 0


def test_the_interval_holds_the_true_difference_at_all_looks() -> None:
    generator = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        total = NONE
        for _ in range(40):
            d = (generator.random(25) < 0.15).astype(float) - (generator.random(25) < 0.1)
            total = total.plus(Sums(25, d.sum(), (d**2).sum()))
            _, low, high = labels.difference(Learned(pairs=total), 200)
            if not low <= 0.05 <= high:
                missed += 1
                break
    assert missed <= 10
