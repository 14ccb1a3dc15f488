"""Broken evidence passes nothing and fails nothing: every kind of fault, for every gate."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import gates
from policies.events import Phase
from policies.verdict import Verdict, worst
from tests.benchmarks import outages
from tests.benchmarks.faulty import GATES, KINDS, POLICY, about_to_pass, case, counts, healthy

SILENT = {Verdict.HOLD, Verdict.ERROR}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_broken_evidence_neither_passes_nor_fails(gate: str, kind: str, seed: int) -> None:
    for total, own in case(gate, kind, random.Random(seed)).verdicts(gate):
        assert total in SILENT
        assert own in SILENT


@pytest.mark.parametrize("kind", ["NaN", "infinite", "negative", "source error", "source time-out", "clock going back"])
@pytest.mark.parametrize("gate", GATES)
def test_what_cannot_be_true_or_read_is_an_error_and_not_a_lack_of_evidence(gate: str, kind: str) -> None:
    assert case(gate, kind, random.Random(1)).verdicts(gate)[0][1] is Verdict.ERROR


def test_without_the_fault_the_same_rollout_passes() -> None:
    """Or else the matrix above would prove nothing."""
    _, reports = gates.look(POLICY, 1, about_to_pass(1), healthy(41))
    assert worst(report.verdict for report in reports) is Verdict.PASS


def test_after_an_outage_of_its_sources_a_rollout_goes_on() -> None:
    state = about_to_pass(1)
    for i in range(25):
        state, _ = gates.look(POLICY, 1, state, replace(healthy(41 + i), problems={"counts": "connection refused"}))
    state, reports = gates.look(POLICY, 1, state, healthy(70))
    assert worst(report.verdict for report in reports) is Verdict.PASS


def test_after_the_clock_went_back_a_rollout_goes_on() -> None:
    state, _ = gates.look(POLICY, 1, about_to_pass(1), replace(healthy(41), at=10.0))
    state, first = gates.look(POLICY, 1, state, replace(healthy(42), at=11.0))
    assert worst(report.verdict for report in first) is Verdict.HOLD
    _, second = gates.look(POLICY, 1, state, replace(healthy(43), at=12.0))
    assert worst(report.verdict for report in second) is Verdict.PASS


@pytest.mark.parametrize("source", outages.SOURCES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_outages_shorter_than_the_grace_end_in_the_promotion_of_a_good_version(source: str, seed: int) -> None:
    """Gates and machine together: nothing goes back for it, and nothing goes on while nobody could look."""
    ended = outages.walk(random.Random(seed), source)
    assert ended.machine.phase is Phase.PROMOTED, ended.machine.reason
    assert ended.blind_moves == 0


def test_longer_outages_do_roll_back() -> None:
    """Or else the walks above would prove nothing."""
    ends = [outages.walk(random.Random(seed), "counts", longest_s=60.0).machine.phase for seed in range(20)]
    assert ends.count(Phase.ROLLED_BACK) > 10


def test_errors_from_before_a_restart_are_not_counted_twice() -> None:
    """The counters of a restarted process begin anew; what it then counts is compared with that beginning."""
    state = about_to_pass(1)
    anew = replace(healthy(41), candidate=counts(5, 5, epoch="b"))
    state, _ = gates.look(POLICY, 1, state, anew)
    before = state.errors
    state, _ = gates.look(POLICY, 1, state, replace(healthy(42), candidate=counts(205, 5, epoch="b")))
    assert before is not None
    assert state.errors is not None
    assert state.errors.k_c == before.k_c
    assert state.errors.n_c == before.n_c + 200
