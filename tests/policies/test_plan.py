"""A plan says what then happens: checked against simulated rollouts through the same gates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies import gates, rates
from policies.plan import duration, plan
from policies.policy import Policy
from policies.policy_yaml import parse
from tests.benchmarks.judges import blank

POLICY = """
policy: planned
rollout:
  burn_in: 0s
  stages:
    - shadow: {{share: 1.0, for: 60s}}
    - canary: {{weight: {weight}, for: {length}}}
  gates:
    errors: {{margin: {margin}}}
  watch: {{for: 60s, shadow: 1.0}}
"""


def policy(margin: str = "0.01", length: str = "5m", weight: int = 20) -> Policy:
    return parse(POLICY.format(margin=margin, length=length, weight=weight))


def passed_within(asked: Policy, rps: float, rate: float, seconds: float, rollouts: int = 150) -> float:
    """The share of rollouts of a good version whose canary stage is ready to pass after so many seconds of it."""
    generator = np.random.default_rng(11)
    ladder = gates.margins(asked, asked.rollout.gates.errors)  # type: ignore[arg-type]
    known = blank(rollouts, len(ladder))
    for stage, length, weight in ((0, 60, None), (1, math.ceil(seconds), 0.2)):
        known = rates.enter_stage(known) if stage else known
        for _ in range(length):
            total = generator.poisson(rps, rollouts)
            n_c = total if weight is None else generator.binomial(total, weight)
            n_s = total if weight is None else total - n_c
            k_c, k_s = generator.binomial(n_c, rate), generator.binomial(n_s, rate)
            known = rates.tick(known, n_c, k_c, n_s, k_s, stage, ladder)
    return float((rates.log_no_worse(known, 1) >= math.log(20)).mean())


@pytest.mark.parametrize(("rps", "rate"), [(3.0, 0.0001), (5.0, 0.005), (20.0, 0.02)])
def test_the_time_that_a_gate_needs_suffices_and_is_not_padded(rps: float, rate: float) -> None:
    """In the planned time nine of ten good versions pass; in a third of it not nearly as many."""
    needed = plan(policy(), rps, rate).stages[1].gates[0].needs_s
    assert passed_within(policy(), rps, rate, needed) >= 0.9
    assert passed_within(policy(), rps, rate, needed / 3) < 0.9


def test_a_plan_with_time_enough_has_no_problem_and_takes_its_planned_time() -> None:
    made = plan(policy(), 100.0, 0.001)
    assert made.problems == ()
    assert made.eta_s == 60 + 300 + 60
    assert made.exposed == 100 * 0.2 * 300
    assert [stage.name for stage in made.stages] == ["shadow 100 %", "canary 20 %", "watch"]


def test_a_gate_that_cannot_see_its_margin_in_time_is_a_problem_that_names_the_remedy() -> None:
    made = plan(policy(length="10s"), 3.0, 0.001)
    text = next(problem for problem in made.problems if problem.startswith("canary"))
    assert "'errors' can hardly rule out 1 points more in 10s" in text
    assert "`for: " in text
    assert "wider margin" in text
    remedy = text.split("`for: ")[1].split("`")[0]
    mended = plan(policy(length=remedy), 3.0, 0.001)
    assert not [problem for problem in mended.problems if problem.startswith("canary")]


def test_more_traffic_sees_smaller_regressions() -> None:
    seen = [plan(policy("0.001"), rps, 0.002).stages[1].gates[0].visible for rps in (10.0, 100.0, 1000.0)]
    assert seen[0] is not None
    assert seen[1] is not None
    assert seen[2] is not None
    assert seen[0] > seen[1] > seen[2]


def test_a_planned_regression_is_seen_with_the_power_that_the_plan_says() -> None:
    asked = policy("0.002")
    visible = plan(asked, 30.0, 0.002).stages[1].gates[0].visible
    assert visible is not None
    generator, rollouts = np.random.default_rng(4), 150
    ladder = gates.margins(asked, asked.rollout.gates.errors)  # type: ignore[arg-type]
    known = blank(rollouts, len(ladder))
    caught = np.zeros(rollouts, bool)
    for stage, length, share_c, share_s in ((0, 60, 1.0, 1.0), (1, 300, 0.2, 0.8)):
        known = rates.enter_stage(known) if stage else known
        for _ in range(length // 5):
            n_c, n_s = generator.poisson(150 * share_c, rollouts), generator.poisson(150 * share_s, rollouts)
            k_c, k_s = generator.binomial(n_c, 0.002 + visible), generator.binomial(n_s, 0.002)
            known = rates.tick(known, n_c, k_c, n_s, k_s, stage, ladder)
            alarm = rates.log_worse(known, 3) >= -math.log(gates.alpha(asked))
            caught |= alarm & rates.beyond_half(known, ladder[-1])
    assert caught.mean() >= 0.9


@pytest.mark.parametrize("rps", [0.0, -1.0, math.nan, math.inf])
def test_no_traffic_is_no_plan(rps: float) -> None:
    with pytest.raises(ValueError, match="no traffic"):
        plan(policy(), rps)


def test_rates_are_shares() -> None:
    with pytest.raises(ValueError, match=r"error rate is 1\.5"):
        plan(policy(), 10.0, error_rate=1.5)


def test_all_gates_are_planned() -> None:
    text = POLICY.format(weight=20, length="5m", margin="2x").replace(
        "    errors:", "    latency: {slo_ms: 20}\n    drift: {}\n    disagreement: {}\n    errors:"
    )
    made = plan(parse(text), 50.0, 0.002, 0.01)
    assert [gate.gate for gate in made.stages[0].gates] == ["errors", "latency", "drift", "disagreement"]
    assert [gate.gate for gate in made.stages[1].gates] == ["errors", "latency", "drift"]
    assert all(math.isfinite(gate.needs) for stage in made.stages for gate in stage.gates)


@pytest.mark.parametrize(("seconds", "text"), [(45, "45s"), (119.2, "120s"), (121, "3m"), (7200, "120m"), (9000, "3h")])
def test_durations_are_written_as_a_policy_takes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stage_in_which_no_gate_is_asked_is_a_problem() -> None:
    text = POLICY.format(weight=20, length="5m", margin="0.01").replace("errors: {margin: 0.01}", "errors: null")
    made = plan(parse(text), rps=100.0)
    assert [problem.split(":")[0] for problem in made.problems] == ["shadow 100 %", "canary 20 %", "watch"]
    assert all("no gate is asked" in problem for problem in made.problems)
    unwatched = plan(parse(text.replace("{for: 60s, shadow: 1.0}", "{for: 0s}")), rps=100.0)
    assert [problem.split(":")[0] for problem in unwatched.problems] == ["shadow 100 %", "canary 20 %"]
