"""Speed: intervals that hold what they say, bars that are kept, and nothing passes unmeasured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from policies.policy import Benchmark, Slo
from policies.speed import benchmark, figures, quantile
from policies.verdict import GateReport, Verdict


@dataclass(frozen=True)
class Run:
    requests: int
    failed: int
    latency_ms: tuple[float, ...]
    throughput_rps: float = 1000.0
    memory_mb: float = 100.0
    load_s: float = 0.5


def run(scale: float = 1.0, requests: int = 3000, seed: int = 1) -> Run:
    latency = np.random.default_rng(seed).lognormal(0.0, 0.4, requests) * scale
    return Run(requests, 0, tuple(latency.tolist()), throughput_rps=1000.0 / scale)


def verdicts(reports: tuple[GateReport, ...]) -> dict[str, Verdict]:
    return {report.gate: report.verdict for report in reports}


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_the_interval_holds_the_true_quantile_at_least_as_often_as_it_says(q: float) -> None:
    rng = np.random.default_rng(2)
    real = -math.log(1 - q)
    held = sum(
        low <= real <= high for _, low, high in (quantile(rng.exponential(size=600).tolist(), q) for _ in range(1000))
    )
    assert held / 1000 >= 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / 1000)


def test_a_quantile_beyond_what_the_values_can_bound_has_no_upper_end() -> None:
    assert quantile([1.0] * 100, 0.99)[2] == math.inf
    assert quantile([1.0] * 1000, 0.99)[2] == 1.0


def test_an_slo_is_passed_failed_or_left_open_by_the_interval() -> None:
    p99 = quantile(run().latency_ms, 0.99)
    for bar, verdict in ((p99[2] * 1.01, Verdict.PASS), (p99[0], Verdict.HOLD), (p99[1] * 0.99, Verdict.FAIL)):
        rules = Benchmark(slo=Slo(latency_ms_p99=bar))
        assert verdicts(benchmark(rules, run(), None))["benchmark.latency"] is verdict


def test_the_other_bars_hold_as_numbers() -> None:
    slo = Slo(throughput_rps_min=900, memory_mb_max=150, load_s_max=1)
    assert set(verdicts(benchmark(Benchmark(slo=slo), run(), None)).values()) == {Verdict.PASS}
    worse = replace(run(), throughput_rps=800.0, memory_mb=200.0, load_s=2.0)
    seen = verdicts(benchmark(Benchmark(slo=slo), worse, None))
    assert [gate for gate, verdict in seen.items() if verdict is Verdict.FAIL] == [
        "benchmark.throughput",
        "benchmark.memory",
        "benchmark.load",
    ]


def test_what_was_not_measured_never_passes() -> None:
    slo = Slo(latency_ms_p99=20, throughput_rps_min=1, memory_mb_max=150, load_s_max=1)
    nothing = Run(0, 0, (), throughput_rps=math.nan, memory_mb=0.0, load_s=0.0)
    for champion in (None, run(), nothing):
        reports = benchmark(Benchmark(slo=slo), nothing, champion)
        assert Verdict.PASS not in verdicts(reports).values(), reports
    assert verdicts(benchmark(Benchmark(), run(), nothing))["benchmark.regression[p50]"] is Verdict.HOLD


def test_one_failed_request_fails_the_benchmark() -> None:
    report = benchmark(Benchmark(), replace(run(), failed=1), None)[0]
    assert (report.verdict, report.says.startswith("1 of 3000 requests failed")) == (Verdict.FAIL, True)


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, Verdict.PASS), (0.5, Verdict.PASS), (1.4, Verdict.FAIL)])
def test_a_slow_down_beyond_the_tolerated_fails_and_the_same_speed_passes(scale: float, verdict: Verdict) -> None:
    seen = verdicts(benchmark(Benchmark(regression_max=0.15), run(scale, seed=3), run(seed=4)))
    for gate in ("benchmark.regression[p50]", "benchmark.regression[p90]", "benchmark.regression[throughput]"):
        assert seen[gate] is verdict, gate


def test_equal_versions_are_not_failed_for_noise() -> None:
    """A/A with 5 % tolerated, 200 times: a failure needs the whole interval beyond it."""
    failed = sum(
        Verdict.FAIL
        in verdicts(benchmark(Benchmark(regression_max=0.05), run(1, 400, 2 * s), run(1, 400, 2 * s + 1))).values()
        for s in range(200)
    )
    assert failed <= 4


def test_the_figures_are_those_of_the_run() -> None:
    numbers = figures(Run(3, 1, (1.0, 2.0, math.nan, 3.0)))
    assert (numbers["latency_ms_p50"], numbers["throughput_rps"], numbers["failed"]) == (2.0, 1000.0, 1.0)
    assert "latency_ms_p50" not in figures(Run(0, 0, ()))
