"""A rollout played on recorded traffic ends as the live one would, and says where and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from policies.evidence import ColumnDrift, Drift
from policies.policy import parse
from policies.rehearsal import Recording, Rehearsal, rehearse

POLICY = """
policy: p
rollout:
  stages:
    - shadow: {share: 1.0, for: 30s}
    - canary: {weight: 10, for: 60s}
    - canary: {weight: 50, for: 60s}
  gates: {errors: {margin: 0.05}, disagreement: {margin: 0.2, tolerance: 0.5}%s}
  watch: {for: 60s, shadow: 0.5}
  patience: 60s
governance: {approvals: {by: [ann]}, freeze: [{from: mon 00:00, to: sun 23:00}]}
"""


def recording(seconds: float = 600.0, rps: float = 40.0, **changed: Any) -> Recording:
    generator = np.random.default_rng(3)
    count = int(seconds * rps)
    answers = generator.random(count)
    sides = {"stable": answers, "candidate": answers} | changed
    return Recording(np.arange(count) / rps, generator.random(count), **sides)


def play(seen: Recording, more: str = "", compare: Any = lambda _stable, _candidate: None) -> Rehearsal:
    return rehearse(parse(POLICY % more), "m", "2", "1", seen, compare)


def failing(seen: Recording, share: float) -> Recording:
    broken = np.random.default_rng(4).random(len(seen.at)) < share
    return Recording(seen.at, seen.lots, seen.stable, np.where(broken, np.nan, seen.candidate))


def test_a_version_that_answers_the_same_is_promoted_by_every_stage_in_its_time() -> None:
    seen = play(recording())
    assert (seen.outcome, [move.label for move in seen.moves]) == (
        "promoted", ["shadow 100 %", "canary 10 %", "canary 50 %", "promoting", "watching", "promoted"],
    )  # fmt: skip
    assert 210.0 <= seen.seconds < 280.0
    share = 0.1 * 60 + 0.5 * 60 + 60
    assert seen.exposed == pytest.approx(40 * share, rel=0.2), "the shadow's copies are no client's"
    assert any("freeze" in each for each in seen.not_asked)
    assert any("approvals" in each for each in seen.not_asked)


def test_a_version_that_fails_goes_back_before_it_meets_many() -> None:
    seen = play(failing(recording(), 0.3))
    assert seen.outcome == "rolled_back"
    assert "errors" in seen.why
    assert seen.exposed == 0, "its shadow has shown it"


def test_other_answers_are_told_by_the_shadow() -> None:
    seen = play(recording(candidate=np.full(24_000, 5.0)))
    assert (seen.outcome, "disagreement" in seen.why) == ("rolled_back", True)


def test_drift_is_asked_of_the_rows_that_each_side_answered() -> None:
    asked = []

    def compare(stable: Any, candidate: Any) -> Drift:
        asked.append((len(stable), len(candidate), len(np.intersect1d(stable, candidate))))
        column = ColumnDrift("prediction", "wasserstein", 3.0, 0.001, high=3.2, error=0.05)
        return Drift(len(stable), len(candidate), (column,), 0.001, 0.001)

    seen = play(recording(), ", drift: {threshold: 0.1, rows_min: 100}", compare)
    assert (seen.outcome, "drift" in seen.why) == ("rolled_back", True)
    assert asked
    assert asked[0][0] == asked[0][2], "a shadow answers the stable version's own requests"


def test_a_recording_that_is_too_short_says_what_it_lacked() -> None:
    seen = play(recording(seconds=50.0))
    assert (seen.outcome, "canary 10 %" in seen.why) == ("unfinished", True)


def test_no_traffic_is_no_evidence() -> None:
    seen = play(recording(seconds=3000.0, rps=0.01))
    assert (seen.outcome, "not enough evidence" in seen.why) == ("rolled_back", True)


@pytest.mark.parametrize("change", [{"at": np.array([2.0, 1.0])}, {"stable": np.array([1.0])}])
def test_a_recording_that_is_none_is_refused(change: dict[str, Any]) -> None:
    two = {name: np.array([0.1, 0.2]) for name in ("at", "lots", "stable", "candidate")}
    with pytest.raises(ValueError, match="recording"):
        Recording(**{**two, **change})
