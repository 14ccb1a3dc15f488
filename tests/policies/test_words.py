"""`policy explain` says every rule, defaults included."""

from __future__ import annotations

import pytest

from policies.policy_yaml import parse
from policies.words import duration, explain

SOUND = """
policy: flights-cpu
rollout:
  stages:
    - shadow: {share: 1.0, for: 2m}
    - canary: {weight: 5, for: 5m}
    - canary: {weight: 25, for: 10m}
"""


@pytest.mark.parametrize(
    ("seconds", "words"), [(90.0, "90 s"), (300.0, "5 min"), (7200.0, "2 h"), (86400.0, "1 d"), (0.5, "0.5 s")]
)
def test_durations_are_written_as_people_write_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_every_stage_and_every_gate_has_its_line() -> None:
    text = "\n".join(
        explain(
            parse(
                SOUND
                + "  gates:\n    errors: {margin: 0.007}\n    latency: {slo_ms: 33, margin: 0.02}\n"
                + "    drift: {threshold: 0.17}\n    disagreement: {margin: 0.03}\n"
            )
        )
    )
    for words in ("copies of 100 %", "5 % of the live", "25 % of the live", "0.007", "33 ms", "0.17", "3 %"):
        assert words in text


def test_a_time_out_is_said_where_there_is_one() -> None:
    assert "answered within" not in "\n".join(explain(parse(SOUND)))
    assert "Every request is answered within 0.5 s" in "\n".join(explain(parse(SOUND + "  timeout: 500ms\n")))


def test_limits_are_said_although_the_file_does_not_name_them() -> None:
    text = "\n".join(explain(parse(SOUND)))
    assert "goes back by itself" in text
    assert "at most 5 % of rollouts" in text


def test_what_is_looked_at_once_it_serves_has_its_lines() -> None:
    told = "\n".join(explain(parse(SOUND)))
    assert "every 1 h; chance raises 0.1 alarms a year" in told
    assert "No alarm moves any traffic." in told
    more = "monitor: {every: 1d, data: live.yaml, quality: {margin: 0.03}, retrain: {deployment: train/it}"
    more += ", rollback_on: [data]}"
    told = "\n".join(explain(parse(SOUND + more)))
    for words in ("every 1 d", "live.yaml", "0.03", "train/it", "about data brings the former version back"):
        assert words in told
