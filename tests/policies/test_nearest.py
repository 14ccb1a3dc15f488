"""The nearest value that would have changed a word does change it, and a nearer one does not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from policies import gates
from policies.evidence import Outcomes, Pairs, Sums
from policies.nearest import nearest, of_check
from policies.verdict import GateReport, Verdict
from tests.benchmarks.faulty import POLICY, about_to_pass, counts, healthy

TICKS = 1  # few enough that one more look can turn the verdict


def early() -> gates.State:
    state = gates.begin(POLICY)
    for tick in range(TICKS):
        state, _ = gates.look(POLICY, 1, state, healthy(tick))
    return state


def said(gate: str, **seen: object) -> GateReport:
    _, reports = gates.look(POLICY, 1, early(), replace(healthy(TICKS), **seen))  # type: ignore[arg-type]
    return next(report for report in reports if report.gate == gate)


def told(gate: str, **seen: object) -> tuple[int, int, str]:
    """(nearest, seen, verdict) as the sentence has them."""
    evidence = replace(healthy(TICKS), **seen)  # type: ignore[arg-type]
    text = nearest(POLICY, 1, early(), evidence, said(gate, **seen))
    found = re.match(r"([\d,]+) .* instead of ([\d,]+): (\w+)", text)
    assert found, text
    return int(found[1].replace(",", "")), int(found[2].replace(",", "")), found[3]


@pytest.mark.parametrize("errors", [0, 1, 30, 150])
def test_errors(errors: int) -> None:
    near, seen, verdict = told("errors", candidate=counts(600, errors))
    assert seen == errors
    first = said("errors", candidate=counts(600, errors)).verdict
    nearer = near - 1 if near > errors else near + 1
    assert said("errors", candidate=counts(600, near)).verdict == verdict
    assert verdict != first
    assert said("errors", candidate=counts(600, nearer)).verdict is first


def test_slow_requests() -> None:
    first = said("latency", candidate=counts(600, 0, 2)).verdict
    near, seen, verdict = told("latency", candidate=counts(600, 0, 2))
    assert seen == 2
    assert verdict != first
    assert said("latency", candidate=counts(602 - near, 0, near)).verdict == verdict


def test_pairs() -> None:
    first = said("disagreement", pairs=Pairs(400, 2)).verdict
    near, _, verdict = told("disagreement", pairs=Pairs(400, 2))
    assert verdict != first
    assert said("disagreement", pairs=Pairs(400, near)).verdict == verdict
    assert said("disagreement", pairs=Pairs(400, near - 1 if near > 2 else near + 1)).verdict is first


def test_a_comparison_is_held_against_its_threshold() -> None:
    text = nearest(POLICY, 1, about_to_pass(1), healthy(41), said("drift"))
    assert text.startswith("an upper limit at or above")


@pytest.mark.parametrize(
    ("verdict", "numbers", "text"),
    [
        (Verdict.FAIL, {"estimate": 30.0, "low": 25.0, "high": 40.0}, "a lower limit below 20 instead of 25 (ms)"),
        (Verdict.PASS, {"estimate": 10.0, "low": 8.0, "high": 15.0}, "an upper limit above 20 instead of 15 (ms)"),
        (Verdict.FAIL, {"estimate": 30.0}, "a value below 20 instead of 30 (ms)"),
        (Verdict.PASS, {"estimate": 20.0}, "a value above 20 instead of 20 (ms)"),
        (Verdict.HOLD, {"estimate": 19.0, "needs": "a longer benchmark"}, "a longer benchmark"),
        (Verdict.ERROR, {}, "evidence that can be read, and can be true"),
    ],
)
def test_a_check_is_held_against_its_threshold(verdict: Verdict, numbers: dict[str, Any], text: str) -> None:
    assert of_check(GateReport("benchmark.latency", verdict, "", threshold=20.0, unit="ms", **numbers)) == text


def test_what_could_not_be_read_would_have_had_to_be_read() -> None:
    report = GateReport("errors", Verdict.ERROR, "down")
    assert "can be read" in nearest(POLICY, 1, about_to_pass(1), healthy(41), report)


@pytest.mark.parametrize("worse", [0.0, 0.02, 0.3, 0.5, 0.8, 0.9, 0.93, 0.95])
def test_labels(worse: float) -> None:
    """With a mean loss so much lower or higher at this look the word is another one, with a little less it is not."""
    n = 200 * TICKS

    def outcomes(by: float) -> Outcomes:
        return Outcomes(1000.0, pairs=Sums(n, n * by, n * (0.02 + by * by)), waiting=100)

    first = said("quality", outcomes=outcomes(worse)).verdict
    text = nearest(
        POLICY, 1, early(), replace(healthy(TICKS), outcomes=outcomes(worse)), said("quality", outcomes=outcomes(worse))
    )
    found = re.match(r"a mean loss (lower|higher) by ([\d.]+) on the ([\d,]+) answers .*: (\w+)$", text)
    assert found, text
    near = float(found[2]) * (-1 if found[1] == "lower" else 1)
    nearer = near - 1e-4 if near > 0 else near + 1e-4
    assert said("quality", outcomes=outcomes(worse + near)).verdict == found[4] != first
    assert said("quality", outcomes=outcomes(worse + nearer)).verdict is first


def test_labels_that_came_before_this_look_cannot_be_changed_by_it() -> None:
    after = replace(healthy(41), outcomes=None)
    _, reports = gates.look(POLICY, 1, about_to_pass(1), after)
    report = next(report for report in reports if report.gate == "quality")
    assert "the looks before" in nearest(POLICY, 1, about_to_pass(1), after, report)
