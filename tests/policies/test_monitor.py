"""Looks at what serves: alarms are as rare as the policy says, drift is found in its first period, and silence is told
apart from health."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from infra.outcomes_arrow import loss
from policies import monitor
from policies.evidence import ColumnDrift, Drift, Sums
from policies.monitor import Estimate, Group, Seen, Steps
from policies.policy import LiveDrift, LiveQuality, Monitor, Retrain
from policies.verdict import GateReport, Verdict

RULES = Monitor(quality=LiveQuality())
PERIODS = 50


def drift(
    p: float, distance: float = 0.2, high: float | None = None, rows: int = 4000, lost: float = 0.0, error: float = 0.01
) -> Drift:
    column = ColumnDrift("age", "wasserstein", distance, p, 0.0, lost, distance if high is None else high, error)
    return Drift(rows, rows, (column,), p)


def seen(*halves: float, distance: float = 0.2, high: float | None = None, **more: object) -> Seen:
    group = Group("inputs", drift(1.0, distance, high), (drift(halves[0], distance), drift(halves[1], distance)))
    return Seen("m", "1", 0.0, 3600.0, rows=4000, reference="training rows", groups=(group,), **more)  # type: ignore[arg-type]


def word(found: Seen, gate: str = "inputs", rules: Monitor = RULES) -> Verdict:
    return next(report.verdict for report in monitor.judge(rules, found) if report.gate == gate)


# ---------------------------------------------------------------- few false alarms, none late


def p_values(reference: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Exact p-values for "the means differ", of rows with variance 1 (two-sided): (seeds, periods)."""
    n = 200
    return np.asarray(2 * norm.sf(np.abs(live - reference) / math.sqrt(2 / n)))


def halves(seeds: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of 200 rows: p-values of both halves over 50 periods, each half against its own half of one reference."""
    generator = np.random.default_rng(seed)
    sd = 1 / math.sqrt(200)
    reference = generator.normal(0, sd, (2, seeds, 1))
    live = generator.normal(shift, sd, (2, seeds, PERIODS))
    return p_values(reference[0], live[0]), p_values(reference[1], live[1])


def alarms(rules: Monitor, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether each period's look is an alarm, by the gate itself where it could be one: (seeds, periods)."""
    limit = monitor.alpha_half(rules)
    found = np.zeros(first.shape, dtype=bool)
    for at in zip(*np.nonzero((first < 2 * limit) & (second < 2 * limit)), strict=True):
        found[at] = word(seen(float(first[at]), float(second[at])), rules=rules) is Verdict.FAIL
    return found


def test_without_drift_alarms_are_as_rare_as_the_policy_says() -> None:
    """1,500 models, 50 periods each, against one reference sample per model. The policy's rate is set so high that
    the promise can break: a test at the same level that used one half twice would alarm some four times as often."""
    rules = Monitor(every="7d", false_alarms_per_year=12)
    first, second = halves(1500, 0.0, seed=1)
    share = alarms(rules, first, second).mean()
    stated = monitor.alpha(rules)
    assert 0.5 * stated < share < 1.15 * stated
    assert alarms(rules, first, first).mean() > 2 * stated


def test_by_default_there_is_no_alarm_in_fifty_periods_without_drift() -> None:
    """2,000 models, 100,000 looks: the policy allows one alarm in 87,660 hourly looks, over all tests."""
    found = alarms(RULES, *halves(2000, 0.0, seed=2))
    assert found.any(axis=1).sum() <= 1


def test_a_drift_is_found_in_the_first_period_that_it_fills() -> None:
    """0.6 standard deviations, 200 rows a half: at the hourly default rate."""
    found = alarms(RULES, *halves(400, 0.6, seed=3))
    assert found[:, 0].mean() > 0.98


@pytest.mark.parametrize("every_s", [30.0, 3600.0, 86400.0, 31 * 86400.0])
def test_an_alarm_can_be_raised_at_any_period_and_rate(every_s: float) -> None:
    """The smallest p-value that the permutations can give is small enough, and their number can be afforded."""
    for rate in (0.01, 0.1, 12):
        rules = Monitor(every=f"{every_s}s", false_alarms_per_year=rate)
        smallest = 1 / (monitor.permutations(rules) + 1)
        assert smallest <= monitor.alpha_half(rules)
        assert monitor.permutations(rules) <= 21_000


def test_a_difference_below_the_threshold_is_no_drift_however_sure() -> None:
    assert word(seen(1e-9, 1e-9, distance=0.09, high=0.095)) is Verdict.PASS


def test_at_the_threshold_alarms_are_as_rare_as_the_policy_says() -> None:
    """Windows that are certainly different, by exactly the tolerated distance, seen with its standard error."""
    rules = Monitor(every="7d", false_alarms_per_year=12, drift=LiveDrift(threshold=0.1))
    errors = np.random.default_rng(5).normal(0.0, 0.01, 20_000)
    found = [each for each in errors if word(seen(1e-9, 1e-9, distance=0.1 + each, high=1.0), rules=rules) == "fail"]
    assert 0 < len(found) / errors.size <= 1.25 * monitor.alpha(rules)


def test_one_half_alone_raises_no_alarm() -> None:
    assert word(seen(1e-9, 0.2)) is Verdict.HOLD


# ---------------------------------------------------------------- no all-clear without evidence


def test_nothing_looked_at_is_a_hold_and_a_dead_source_an_error() -> None:
    empty = Seen("m", "1", 0.0, 1.0)
    assert {report.verdict for report in monitor.judge(RULES, empty)} == {Verdict.HOLD}
    down = replace(empty, problems={"rows": "the disk is gone", "labels": "so is this one"})
    assert {report.verdict for report in monitor.judge(RULES, down)} == {Verdict.ERROR}
    lacking = replace(empty, lacking={"rows": "no sampled row"})
    assert monitor.verdict_of(monitor.judge(RULES, lacking)) is Verdict.HOLD


def test_no_drift_is_only_said_where_it_is_shown() -> None:
    assert word(seen(0.5, 0.5, distance=0.05, high=0.15)) is Verdict.HOLD
    assert word(seen(0.5, 0.5, distance=0.05, high=0.09)) is Verdict.PASS


def test_too_few_rows_say_nothing() -> None:
    few = replace(seen(1e-9, 1e-9), groups=(Group("inputs", drift(1.0, rows=900), (drift(1e-9), drift(1e-9))),))
    assert word(few) is Verdict.HOLD
    assert word(few, "missing") is Verdict.HOLD
    assert word(few, rules=Monitor(drift=LiveDrift(rows_min=800))) is Verdict.FAIL


@given(
    st.sampled_from(["statistic", "p_value", "missing_candidate", "high"]),
    st.sampled_from([math.nan, math.inf, -1.0, 7.0]),
)
def test_a_comparison_that_cannot_be_is_an_error(name: str, value: float) -> None:
    broken = drift(0.5, distance=0.01)
    bad = replace(broken, columns=(replace(broken.columns[0], **{name: value}),))
    found = word(replace(seen(0.5, 0.5), groups=(Group("inputs", bad, (broken, broken)),)))
    assert found is Verdict.ERROR or (name in ("statistic", "high") and value == 7.0)


def test_a_group_that_could_not_be_compared_hides_no_other_s_alarm_and_gives_no_all_clear() -> None:
    """`missing` is of all groups: it passes only where all could be looked at."""
    for rows, lost in ((seen(1e-9, 1e-9), {"inputs": Verdict.FAIL}), (seen(1.0, 1.0, distance=0.01), {})):
        for where, word in (("problems", Verdict.ERROR), ("lacking", Verdict.HOLD)):
            reports = monitor.judge(Monitor(), replace(rows, **{where: {"categories": "no such column"}}))
            expected = {"categories": word, "inputs": Verdict.PASS, "missing": word} | lost
            assert {report.gate: report.verdict for report in reports} == expected
            steps = monitor.steps(Monitor(), reports, ("drift",), owed=False, went_back=False)
            assert (steps.standing, steps.ended) == (("drift",), ())
    reports = monitor.judge(Monitor(), replace(seen(1.0, 1.0), groups=(), problems={"inputs": "no such column"}))
    assert [(report.gate, report.verdict) for report in reports] == [("inputs", Verdict.ERROR)]


def test_missing_values_are_an_alarm_of_their_own_whether_there_are_more_or_fewer() -> None:
    for lost, reference in ((0.3, 0.0), (0.0, 0.3)):
        column = ColumnDrift("age", "wasserstein", 0.0, 1.0, reference, lost, 0.0)
        whole = Drift(4000, 4000, (column,), 1.0)
        found = replace(seen(1.0, 1.0), groups=(Group("inputs", whole, (whole, whole)),))
        report = next(each for each in monitor.judge(RULES, found) if each.gate == "missing")
        assert report.verdict is Verdict.FAIL
        assert ("30.0% more" if lost else "30.0% fewer") in report.says
    assert word(seen(1.0, 1.0), "missing") is Verdict.PASS


# ---------------------------------------------------------------- quality


def losses(mean: float, n: int = 2000) -> Sums:
    return Sums(float(n), mean * n, mean * n)


def test_a_higher_loss_on_the_labels_that_came_is_an_alarm_and_the_same_one_passes() -> None:
    for live, expected in ((0.25, Verdict.FAIL), (0.1, Verdict.PASS), (0.135, Verdict.HOLD)):
        found = replace(seen(1.0, 1.0), live=losses(live, 4000), validation=losses(0.1, 4000))
        assert word(found, "quality") is expected, live
    assert word(replace(seen(1.0, 1.0), live=losses(0.9, 10), validation=losses(0.1)), "quality") is Verdict.HOLD
    assert word(replace(seen(1.0, 1.0), live=Sums(50.0, -9.0, 1.0)), "quality") is Verdict.ERROR


def test_the_loss_estimated_without_labels_is_what_labels_would_say() -> None:
    generator = np.random.default_rng(4)
    truth_of = generator.beta(2, 3, 40_000)
    truth = (generator.random(40_000) < truth_of).astype(float)
    scores = truth_of**2  # not calibrated: the validation rows mend that
    known = scores[:20_000], truth[:20_000]
    for metric in ("brier", "accuracy"):
        found = monitor.estimate(metric, scores[20_000:], known)
        assert found is not None
        real = np.mean([loss(metric, p, y) for p, y in zip(scores[20_000:], truth[20_000:], strict=True)])
        assert found.live == pytest.approx(real, abs=0.01)
        assert found.realised == pytest.approx(np.mean([loss(metric, *each) for each in zip(*known, strict=True)]))
    assert monitor.estimate("brier", [0.2, 1.4], None) is None
    assert monitor.estimate("brier", [], None) is None
    plain = monitor.estimate("brier", [0.2, 0.8], None)
    assert plain == Estimate("brier", pytest.approx(0.16))


def test_the_estimate_is_advice_it_neither_alarms_nor_clears_and_says_what_it_cannot_see() -> None:
    found = replace(seen(1.0, 1.0, distance=0.0), estimate=Estimate("brier", 0.9, 0.1, 0.1))
    report = monitor.judge(RULES, found)[-1]
    assert report.gate == "estimate"
    assert report.verdict is Verdict.HOLD
    assert "concept drift" in report.says
    rules = Monitor()
    assert monitor.verdict_of(monitor.judge(rules, found)) is Verdict.PASS


# ---------------------------------------------------------------- what follows


def report(gate: str, verdict: Verdict) -> GateReport:
    return GateReport(gate, verdict, "")


ACTING = Monitor(retrain=Retrain(deployment="train/it"), rollback_on=("quality",))


def test_only_the_beginning_of_an_alarm_acts_and_it_lasts_until_it_is_shown_to_be_over() -> None:
    failing, blind, fine = ([report("inputs", each)] for each in (Verdict.FAIL, Verdict.ERROR, Verdict.PASS))
    begun = monitor.steps(ACTING, failing, (), owed=False, went_back=False)
    assert (begun.began, begun.standing, begun.retrain, begun.rollback) == (("drift",), ("drift",), True, False)
    lasts = monitor.steps(ACTING, failing, begun.standing, owed=False, went_back=False)
    assert (lasts.began, lasts.retrain) == ((), False)
    assert monitor.steps(ACTING, blind, begun.standing, owed=False, went_back=False).standing == ("drift",)
    assert monitor.steps(ACTING, [], begun.standing, owed=False, went_back=False).ended == ("drift",)
    over = monitor.steps(ACTING, fine, begun.standing, owed=False, went_back=False)
    assert (over.standing, over.ended) == ((), ("drift",))


def test_no_traffic_moves_unless_the_policy_says_so_and_never_twice() -> None:
    failing = [report("quality", Verdict.FAIL)]
    assert monitor.steps(ACTING, failing, (), owed=False, went_back=False).rollback
    assert not monitor.steps(ACTING, failing, (), owed=False, went_back=True).rollback
    assert not monitor.steps(Monitor(), failing, (), owed=False, went_back=False).rollback
    assert not monitor.steps(ACTING, [report("quality", Verdict.ERROR)], (), owed=False, went_back=False).rollback
    assert not monitor.steps(ACTING, [report("data", Verdict.FAIL)], (), owed=False, went_back=False).retrain


def test_a_way_back_that_could_not_be_done_is_owed_while_the_alarm_stands_and_nothing_else_is_done_again() -> None:
    failing = [report("quality", Verdict.FAIL)]
    again = monitor.steps(ACTING, failing, ("quality",), owed=True, went_back=False)
    assert (again.began, again.retrain, again.rollback) == ((), False, True)
    assert not monitor.steps(ACTING, failing, ("quality",), owed=False, went_back=False).rollback
    assert not monitor.steps(ACTING, failing, ("quality",), owed=True, went_back=True).rollback
    fine = [report("quality", Verdict.PASS)]
    assert not monitor.steps(ACTING, fine, ("quality",), owed=True, went_back=False).rollback


def test_a_look_can_be_decided_again_from_what_was_written_down() -> None:
    found = seen(1e-9, 1e-9, data=report("data", Verdict.PASS), live=losses(0.3), validation=losses(0.1))
    found = replace(found, estimate=Estimate("brier", 0.2, 0.1, 0.1), lacking={"labels": "none yet"})
    again = monitor.seen_from(json.loads(json.dumps(asdict(found))))
    assert again == found
    assert monitor.judge(RULES, again) == monitor.judge(RULES, found)


def test_the_figures_of_a_look_name_every_column_and_every_alarm() -> None:
    found = seen(1e-9, 1e-9)
    figures = monitor.metrics(found, monitor.judge(RULES, found))
    assert figures["monitor.inputs.age"] == 0.2
    assert (figures["monitor.inputs.alarm"], figures["monitor.missing.alarm"], figures["monitor.rows"]) == (
        1.0,
        0.0,
        4000,
    )


def test_a_beginning_that_could_not_be_acted_on_is_one_still_when_nobody_can_look() -> None:
    stood: dict[str, Any] = {"standing": ("quality",), "unacted": ("quality",), "owed": True, "went_back": False}
    for word in (Verdict.ERROR, Verdict.HOLD, Verdict.FAIL):
        blind = monitor.steps(ACTING, [report("quality", word)], **stood)
        assert blind.began == blind.standing == ("quality",)
        assert blind.rollback
        assert blind.retrain
    over = monitor.steps(ACTING, [report("quality", Verdict.PASS)], **stood)
    assert over == Steps((), (), (), retrain=False, rollback=False), "nobody was told that it began"
