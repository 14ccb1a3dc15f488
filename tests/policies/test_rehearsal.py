"""A rollout played on recorded traffic ends as the live one would, and says where and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policies.evidence import ColumnDrift, Drift
from policies.policy_yaml import parse
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
    fine = np.zeros(count, dtype=bool)
    sides = {"stable": answers, "candidate": answers, "stable_failed": fine, "candidate_failed": fine} | changed
    return Recording(np.arange(count) / rps, generator.random(count), **sides)


def play(seen: Recording, more: str = "", compare: Any = lambda _stable, _candidate: None) -> Rehearsal:
    return rehearse(parse(POLICY % more), "m", "2", "1", seen, compare)


def failing(seen: Recording, share: float) -> Recording:
    broken = np.random.default_rng(4).random(len(seen.at)) < share
    return replace(seen, candidate=np.where(broken, np.nan, seen.candidate), candidate_failed=broken)


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


LONG_PATIENCE = """
policy: p
rollout:
  stages: [canary: {weight: 50, for: 60s}]
  gates: {errors: {margin: 0.5}, drift: {threshold: 0.1, rows_min: 100}}
  watch: {for: 60s, shadow: 0.5}
  patience: 300s
  burn_in: 5s
"""


def apart(rows: int, at_least: int) -> Drift:
    """Two windows whose distance is shown to be small by so many rows."""
    high = 0.05 if rows >= at_least else 0.2
    return Drift(rows, rows, (ColumnDrift("prediction", "wasserstein", 0.01, 0.5, high=high, error=0.01),), 0.5, 0.001)


def test_drift_that_is_not_ruled_out_at_full_length_is_compared_again_while_patience_lasts() -> None:
    asked = []

    def compare(stable: Any, candidate: Any) -> Drift:
        asked.append(min(len(stable), len(candidate)))
        return apart(asked[-1], 1_500)

    seen = rehearse(parse(LONG_PATIENCE), "m", "2", "1", recording(), compare)
    assert (seen.outcome, [move.label for move in seen.moves]) == (
        "promoted", ["canary 50 %", "promoting", "watching", "promoted"]
    ), seen.why  # fmt: skip
    assert 80.0 <= seen.moves[1].at_s < 90.0, "1,500 rows of each come in 75 s, after a burn-in that does not count"
    assert asked == sorted(asked), "the rows of all stages are compared, as live"
    assert len(asked) < 20, "where the live comparisons change nothing, none is made"


def test_drift_that_is_never_ruled_out_is_compared_a_limited_number_of_times() -> None:
    asked = []

    def compare(stable: Any, candidate: Any) -> Drift:
        asked.append(1)
        return apart(1_000, 2_000)

    policy = parse(LONG_PATIENCE.replace("300s", "2h"))
    seen = rehearse(policy, "m", "2", "1", recording(seconds=8000.0, rps=10.0), compare)
    assert (seen.outcome, "not enough evidence" in seen.why) == ("rolled_back", True)
    assert len(asked) <= 260


def test_comparisons_raise_no_more_alarms_than_live() -> None:
    """Three comparisons of a stage may raise one (the third a look after its end), however many are made."""
    asked: list[int] = []

    def compare(stable: Any, candidate: Any) -> Drift:
        asked.append(min(len(stable), len(candidate)))
        column = ColumnDrift("prediction", "wasserstein", 3.0, 0.001, high=3.2, error=0.05)
        return Drift(1000, 1000, (column,), 0.001, 0.001) if len(asked) > 4 else apart(1000, 2000)

    seen = rehearse(parse(LONG_PATIENCE), "m", "2", "1", recording(), compare)
    assert (seen.outcome, "not enough evidence" in seen.why) == ("rolled_back", True)
    assert len(asked) > 20


def test_an_answer_without_a_prediction_is_no_error() -> None:
    seen = recording()
    silent = np.random.default_rng(4).random(len(seen.at)) < 0.3
    played = play(replace(seen, candidate=np.where(silent, np.nan, seen.candidate)))
    assert (played.outcome, "disagreement" in played.why, "errors" in played.why) == ("rolled_back", True, False)


def test_a_recording_that_is_too_short_says_what_it_lacked() -> None:
    seen = play(recording(seconds=50.0))
    assert (seen.outcome, "canary 10 %" in seen.why) == ("unfinished", True)


def test_no_traffic_is_no_evidence() -> None:
    seen = play(recording(seconds=3000.0, rps=0.01))
    assert (seen.outcome, "not enough evidence" in seen.why) == ("rolled_back", True)


@pytest.mark.parametrize("change", [{"at": np.array([2.0, 1.0])}, {"stable": np.array([1.0])}])
def test_a_recording_that_is_none_is_refused(change: dict[str, Any]) -> None:
    two = {name: np.array([0.1, 0.2]) for name in ("at", "lots", "stable", "candidate")}
    two |= {name: np.array([False, False]) for name in ("stable_failed", "candidate_failed")}
    with pytest.raises(ValueError, match="recording"):
        Recording(**{**two, **change})
