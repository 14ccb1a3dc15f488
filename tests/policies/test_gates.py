"""What the gates say of a rollout, look by look, on traffic that is made here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest

from policies import gates
from policies.evidence import LATENCY_EDGES_MS, ColumnDrift, Counts, Drift, Evidence, Pairs
from policies.gates import State
from policies.policy import Policy
from policies.policy_yaml import parse
from policies.verdict import GateReport, Verdict, worst

POLICY = """
policy: test
rollout:
  error_budget: 0.05
  burn_in: 2s
  stages:
    - shadow: {share: 1.0, for: 8s}
    - canary: {weight: 20, for: 10s}
    - canary: {weight: 50, for: 10s}
  gates:
    errors: {margin: 0.02}
    latency: {slo_ms: 20, margin: 0.03}
  watch: {for: 8s}
"""
SLOW, FAST = 60, 10  # buckets of the latency histogram, either side of 20 ms


def policy(gates_yaml: str = "", **changes: str) -> Policy:
    text = POLICY
    for name, value in changes.items():
        text = "\n".join(f"  {name}: {value}" if line.startswith(f"  {name}:") else line for line in text.split("\n"))
    if gates_yaml:
        head, tail = text.split("  gates:\n")
        text = head + "  gates: " + gates_yaml + "\n  watch:" + tail.split("  watch:")[1]
    return parse(text)


@dataclass
class Arm:
    """A version's counters as they grow."""

    requests: int = 0
    errors: int = 0
    slow: int = 0
    epoch: str = "1"

    def add(self, requests: int, errors: int = 0, slow: int = 0) -> None:
        self.requests += requests
        self.errors += errors
        self.slow += slow

    @property
    def counts(self) -> Counts:
        latency = [0] * (len(LATENCY_EDGES_MS) + 1)
        latency[FAST], latency[SLOW] = self.requests - self.slow, self.slow
        return Counts(self.requests, self.errors, tuple(latency), epoch=self.epoch)


@dataclass
class Watcher:
    """A rollout looked at once a second, in stage `stage`."""

    policy: Policy
    stage: int = 1
    at: float = 1000.0
    stable: Arm = field(default_factory=Arm)
    candidate: Arm = field(default_factory=Arm)
    state: State | None = None
    reports: tuple[GateReport, ...] = ()

    def look(self, seconds: float = 1.0, **changes: object) -> Verdict:
        self.at += seconds
        evidence = Evidence(self.at, self.stable.counts, self.candidate.counts)
        state = self.state or gates.begin(self.policy)
        self.state, self.reports = gates.look(self.policy, self.stage, state, replace(evidence, **changes))
        return self.verdict

    def tick(self, n_c: int, n_s: int, k_c: int = 0, k_s: int = 0, slow_c: int = 0, slow_s: int = 0) -> Verdict:
        self.candidate.add(n_c, k_c, slow_c)
        self.stable.add(n_s, k_s, slow_s)
        return self.look()

    def warm(self) -> Watcher:
        """First requests, and the burn-in over."""
        for _ in range(4):
            self.tick(20, 80)
        return self

    @property
    def verdict(self) -> Verdict:
        return worst(report.verdict for report in self.reports)

    def report(self, gate: str) -> GateReport:
        return next(report for report in self.reports if report.gate == gate)


def test_a_version_without_any_error_passes_within_seconds() -> None:
    watcher = Watcher(policy()).warm()
    assert watcher.verdict is Verdict.HOLD, "forty requests without an error do not rule out four points"
    verdicts = [watcher.tick(40, 160) for _ in range(10)]
    assert verdicts[-1] is Verdict.PASS
    assert Verdict.FAIL not in verdicts


@pytest.mark.parametrize(("what", "gate"), [("k_c", "errors"), ("slow_c", "latency")])
def test_a_candidate_that_fails_or_is_slow_is_called_worse(what: str, gate: str) -> None:
    watcher = Watcher(policy()).warm()
    verdicts = [watcher.tick(40, 160, **{what: 3}) for _ in range(6)]
    assert verdicts[-1] is Verdict.FAIL
    report = watcher.report(gate)
    assert report.verdict is Verdict.FAIL
    assert report.low is not None
    assert report.estimate is not None
    assert report.low > 0
    assert report.low <= report.estimate


def test_a_candidate_that_always_fails_is_called_worse_though_its_errors_run_ahead() -> None:
    """An attempt is counted as failed before its request has ended elsewhere: errors lead the requests by a few."""
    watcher = Watcher(policy()).warm()
    watcher.candidate.add(0, errors=85)
    verdicts = [watcher.tick(40, 160, k_c=40) for _ in range(4)]
    assert watcher.candidate.errors > watcher.candidate.requests
    assert verdicts[-1] is Verdict.FAIL


def test_far_more_errors_than_requests_make_no_sense() -> None:
    watcher = Watcher(policy()).warm()
    assert watcher.tick(40, 160, k_c=4000) is Verdict.ERROR


def test_an_incident_that_hits_both_versions_is_no_alarm() -> None:
    watcher = Watcher(policy()).warm()
    generator = np.random.default_rng(3)
    for rate in [0.001] * 30 + [0.6] * 60 + [0.001] * 30:
        k_c, k_s = generator.binomial(40, rate), generator.binomial(160, rate)
        assert watcher.tick(40, 160, k_c=int(k_c), k_s=int(k_s)) is not Verdict.FAIL


def test_a_difference_too_small_to_matter_is_no_reason_to_go_back() -> None:
    """0.4 points more errors, beyond doubt at this traffic, but the margin is two points."""
    watcher = Watcher(policy()).warm()
    for _ in range(60):
        assert watcher.tick(50_000, 50_000, k_c=250, k_s=50) is not Verdict.FAIL
    assert watcher.report("errors").statistic > 1e6  # type: ignore[operator]
    assert watcher.report("errors").verdict is Verdict.PASS


def test_the_burn_in_does_not_count() -> None:
    watcher = Watcher(policy(burn_in="30s"))
    for _ in range(29):
        assert watcher.tick(40, 160, k_c=40) is Verdict.HOLD
    for _ in range(12):
        verdict = watcher.tick(40, 160)
    assert verdict is Verdict.PASS


def test_a_ratio_is_a_margin_too() -> None:
    """2x with its floor: reached without any error, and not by a candidate with five times the errors."""
    asked = policy("{errors: {margin: 2x}}")
    healthy = Watcher(asked, stage=2).warm()
    for _ in range(60):
        verdict = healthy.tick(100, 100)
    assert verdict is Verdict.PASS
    broken = Watcher(asked, stage=2).warm()
    for _ in range(60):
        verdict = broken.tick(100, 100, k_c=5, k_s=1)
    assert verdict is Verdict.FAIL


def test_nothing_new_since_the_last_look_passes_nothing() -> None:
    watcher = Watcher(policy()).warm()
    for _ in range(10):
        watcher.tick(40, 160)
    assert watcher.verdict is Verdict.PASS
    assert watcher.look() is Verdict.HOLD
    assert "since the last look" in watcher.report("errors").needs


def test_a_stage_needs_requests_of_its_own() -> None:
    """What was shown in the stage before counts, but a stage without traffic does not pass on it."""
    watcher = Watcher(policy()).warm()
    for _ in range(60):
        watcher.tick(40, 160)
    watcher.stage = 2
    assert watcher.tick(5, 5) is Verdict.HOLD
    for _ in range(4):
        watcher.tick(100, 100)
    assert watcher.verdict is Verdict.PASS


def test_traffic_split_otherwise_than_meant_holds() -> None:
    watcher = Watcher(policy()).warm()
    for _ in range(20):
        verdict = watcher.tick(100, 100)
    assert verdict is Verdict.HOLD
    assert watcher.report("traffic").verdict is Verdict.HOLD
    assert "where 20% were meant" in watcher.report("traffic").says


@pytest.mark.parametrize("asked", ["{errors: null}", "{errors: null, disagreement: {margin: 0.02}}"])
def test_traffic_split_as_meant_passes_no_stage_in_which_no_gate_is_asked(asked: str) -> None:
    watcher = Watcher(policy(asked)).warm()
    assert watcher.tick(20, 80, k_c=20) is Verdict.HOLD
    assert watcher.report("traffic").verdict is Verdict.PASS
    assert "only a person's word passes it" in watcher.report("gates").says


def test_a_state_survives_json_and_decides_the_same() -> None:
    watcher = Watcher(policy("{errors: {}, latency: {slo_ms: 20}, drift: {}, disagreement: {}}"), stage=0).warm()
    drift = Drift(1000, 1000, (ColumnDrift("prediction", "wasserstein", 0.05, 0.4, high=0.08),), 0.4)
    watcher.look(drift=drift, pairs=Pairs(500, 3))
    assert watcher.state is not None
    again = State.from_dict(json.loads(json.dumps(asdict(watcher.state))))
    assert again == watcher.state
    evidence = Evidence(watcher.at + 1, watcher.stable.counts, watcher.candidate.counts, drift, Pairs(600, 3))
    assert gates.evidence_from(json.loads(json.dumps(asdict(evidence)))) == evidence
    assert gates.look(watcher.policy, 0, again, evidence) == gates.look(watcher.policy, 0, watcher.state, evidence)


def test_the_state_stays_small() -> None:
    """The ledger may keep it: it does not grow with the looks."""
    watcher = Watcher(policy()).warm()
    before = len(json.dumps(asdict(watcher.state)))  # type: ignore[arg-type]
    for _ in range(200):
        watcher.tick(40, 160)
    assert len(json.dumps(asdict(watcher.state))) < 2 * before + 1000  # type: ignore[arg-type]


def test_stages_only_go_forward() -> None:
    watcher = Watcher(policy(), stage=2).warm()
    watcher.stage = 1
    with pytest.raises(ValueError, match="stage 1 does not follow stage 2"):
        watcher.look()
    watcher.stage = 4
    with pytest.raises(ValueError, match="stage 4"):
        watcher.look()


def test_the_summary_is_one_line_that_names_each_gate() -> None:
    watcher = Watcher(policy()).warm()
    for _ in range(10):
        watcher.tick(40, 160)
    line = gates.summary(watcher.reports)
    assert "\n" not in line
    assert "errors 0.00% against 0.00%" in line
    assert "latency: slow requests" in line
    assert gates.summary(()) == "no gate was asked"


# ---------------------------------------------------------------- sampled rows


def windows(statistic: float, p_value: float, high: float | None = None, rows: int = 2000, **more: float) -> Drift:
    column = ColumnDrift("prediction", "wasserstein", statistic, p_value, high=high, **{"error": 0.03, **more})
    return Drift(rows, rows, (column,), p_value)


@pytest.fixture
def drifting() -> Watcher:
    return Watcher(policy("{errors: null, drift: {threshold: 0.1, rows_min: 500}}"), stage=2).warm()


def test_a_shift_that_is_large_and_no_accident_fails(drifting: Watcher) -> None:
    assert drifting.look(drift=windows(0.4, 0.0005)) is Verdict.FAIL
    report = drifting.report("drift")
    assert "prediction differs by 0.4" in report.says
    assert "more than 0.1" in report.says
    assert report.low is not None
    assert report.low > 0.1


def test_a_share_finer_than_the_permutations_does_not_blind_the_gate() -> None:
    """One look's share of this budget is far below one in 2,000: the least p-value must do."""
    asked = policy("{errors: null, drift: {threshold: 0.1, rows_min: 500}}", error_budget="0.001")
    watcher = Watcher(asked, stage=2).warm()
    seen = replace(windows(0.6, 0.0005), p_value_least=0.0005)
    assert watcher.look(drift=seen) is Verdict.FAIL


@pytest.mark.parametrize(
    "seen",
    [
        windows(0.05, 0.0005, high=0.07),
        windows(0.15, 0.0005, high=0.3),
        windows(0.23, 0.0005, bias=0.06),
        windows(0.4, 0.0005, error=None),  # type: ignore[arg-type]
        windows(0.4, 0.01),
        windows(0.4, 0.0005, rows=100),
    ],
    ids=[
        "too small to matter",
        "perhaps no larger than the threshold",
        "larger only by its bias",
        "nobody knows how sure",
        "might be an accident",
        "too few rows",
    ],
)
def test_a_shift_that_is_not_both_large_and_sure_does_not_fail(drifting: Watcher, seen: Drift) -> None:
    assert drifting.look(drift=seen) is not Verdict.FAIL


def test_windows_pass_only_when_the_distance_is_shown_to_be_small(drifting: Watcher) -> None:
    assert drifting.look() is Verdict.HOLD
    assert drifting.look(drift=windows(0.06, 0.3, high=0.12)) is Verdict.HOLD
    drifting.look(drift=windows(0.04, 0.3, high=0.08))
    assert drifting.report("drift").verdict is Verdict.PASS
    drifting.look()
    assert drifting.report("drift").verdict is Verdict.PASS, "a look without a new comparison is not a missing one"


def test_missing_values_are_a_difference_of_their_own(drifting: Watcher) -> None:
    assert drifting.look(drift=windows(0.01, 0.9, high=0.02, missing_candidate=0.3)) is Verdict.FAIL
    assert "30.0% more values are missing" in drifting.report("drift").says
    assert "more than 0.1" not in drifting.report("drift").says


def test_a_comparison_takes_its_share_of_the_budget_only_three_times_a_stage(drifting: Watcher) -> None:
    for _ in range(20):
        drifting.look(drift=windows(0.05, 0.3, high=0.2))
    assert drifting.state is not None
    assert drifting.state.shift.spent == 3
    assert drifting.look(drift=windows(0.4, 0.0005)) is not Verdict.FAIL


def test_disagreement_is_asked_where_both_versions_answer_the_same_requests() -> None:
    asked = policy("{errors: {margin: 0.02}, disagreement: {margin: 0.02}}")
    watcher = Watcher(asked, stage=0).warm()
    assert watcher.look(pairs=Pairs(500, 0)) is not Verdict.FAIL
    assert watcher.report("disagreement").verdict is Verdict.PASS
    assert watcher.look(pairs=Pairs(1500, 80)) is Verdict.FAIL
    watcher.stage = 1
    watcher.look()
    assert "disagreement" not in gates.verdicts(watcher.reports)


def test_rows_of_few_requests_say_little_however_many_they_are(drifting: Watcher) -> None:
    """One client whose batch lacks a value is not a tenth of the world."""
    seen = windows(0.01, 0.9, high=0.02, missing_candidate=0.1)
    assert drifting.look(drift=replace(seen, requests_stable=40, requests_candidate=20)) is Verdict.HOLD
    assert "needs rows of 30 requests of each version" in gates.summary(drifting.reports)
    assert drifting.look(drift=replace(seen, requests_stable=40, requests_candidate=30)) is not Verdict.FAIL
    drifting.look(600.0, drift=replace(windows(0.01, 0.9, high=0.02), requests_stable=40))
    assert drifting.report("drift").verdict is Verdict.PASS
    assert (
        drifting.look(drift=replace(seen, requests_stable=400, requests_candidate=300), seconds=600.0) is Verdict.FAIL
    )


@pytest.mark.parametrize("age_s", [-1.0, 1.0, 7200.0])
def test_rows_from_before_the_stage_pass_nothing(age_s: float) -> None:
    """The servers' disks are full: what they sampled in an earlier stage says nothing of this one."""
    watcher = Watcher(policy("{errors: null, drift: {threshold: 0.1, rows_min: 500}}"), stage=1).warm()
    seen = windows(0.04, 0.3, high=0.08)
    watcher.stage = 2
    watcher.look(drift=replace(seen, newest=watcher.at + 1.0 - age_s))
    assert watcher.report("drift").verdict is (Verdict.HOLD if age_s > 0 else Verdict.PASS)
    assert ("no sampled row of the last" in watcher.report("drift").says) == (age_s > 0)
    watcher.look(drift=seen)
    assert watcher.report("drift").verdict is Verdict.PASS, "of evidence recorded without the time nothing is known"


def test_where_only_the_candidate_is_asked_the_rows_before_must_do() -> None:
    asked = policy("{errors: null, drift: {threshold: 0.1, rows_min: 500}}")
    watch = asked.rollout.watch.model_copy(update={"shadow": 0.0})
    asked = asked.model_copy(update={"rollout": asked.rollout.model_copy(update={"watch": watch})})
    watcher = Watcher(asked, stage=gates.rungs(asked) - 1).warm()
    watcher.look(drift=replace(windows(0.04, 0.3, high=0.08), newest=10.0))
    assert watcher.report("drift").verdict is Verdict.PASS
