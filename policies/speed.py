"""Speed: does the version hold its SLO on this hardware, and is it no slower than the champion measured beside it?

Quantiles come with order-statistic intervals (Hahn & Meeker 1991, section 5.2: no assumption on the distribution);
ratios of quantiles combine the two versions' intervals on the log scale (MOVER, Zou & Donner 2008). Requests that
follow each other are alike, so the intervals are a little too narrow; that is why both versions are measured in turns,
and why the tolerated slow-down is a policy's and not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from policies.policy import Benchmark
from policies.verdict import GateReport, Verdict

CONFIDENCE = 0.95
REGRESSION_QUANTILES = (0.5, 0.9)  # p99 of a run of seconds is too coarse for a ratio; the SLO guards it


class Measured(Protocol):
    """What was measured on one version; `tasks.ports.Speed` is one. A `load_s` of 0 means that it is not known."""

    @property
    def requests(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def latency_ms(self) -> Sequence[float]: ...
    @property
    def throughput_rps(self) -> float: ...
    @property
    def memory_mb(self) -> float: ...
    @property
    def load_s(self) -> float: ...


def figures(seen: Measured) -> dict[str, float]:
    """The run in numbers, for people and the registry: `latency_ms_p50`, `_p90`, `_p99`, throughput, memory, load."""
    latency = _latency(seen)
    named = {f"latency_ms_p{q}": float(np.quantile(latency, q / 100)) for q in (50, 90, 99) if len(latency)}
    return {
        **named,
        "throughput_rps": seen.throughput_rps,
        "memory_mb": seen.memory_mb,
        "load_s": seen.load_s,
        "requests": float(seen.requests),
        "failed": float(seen.failed),
    }


def benchmark(rules: Benchmark, candidate: Measured, champion: Measured | None) -> tuple[GateReport, ...]:
    """One report per question: `benchmark.failures` always, the SLO's bars that are set, and, with a champion, the
    ratios to it. Nothing measured never passes."""
    slo = rules.slo
    reports = [_failures(candidate)]
    if slo.latency_ms_p99 is not None:
        reports.append(_latency_slo(candidate, slo.latency_ms_p99))
    bars = (
        ("benchmark.throughput", candidate.throughput_rps, slo.throughput_rps_min, "requests/s", True),
        ("benchmark.memory", candidate.memory_mb, slo.memory_mb_max, "MB", False),
        ("benchmark.load", candidate.load_s, slo.load_s_max, "s", False),
    )
    reports += [_bar(gate, seen, bar, unit, floor) for gate, seen, bar, unit, floor in bars if bar is not None]
    if champion is not None:
        reports += _regression(rules, candidate, champion)
    return tuple(reports)


def quantile(values: Sequence[float], q: float, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """The quantile with its order-statistic interval; an end that the values cannot bound is infinite (low: 0)."""
    ordered = np.sort(_finite(values))
    n = len(ordered)
    if n == 0:
        return math.nan, math.nan, math.nan
    tail = (1 - confidence) / 2
    # Ranks r, s (from 1) with P(X(r) <= quantile) and P(quantile <= X(s)) each at least 1 - tail.
    low = int(stats.binom.ppf(tail, n, q))
    high = int(stats.binom.ppf(1 - tail, n, q)) + 1
    return (
        float(np.quantile(ordered, q)),
        float(ordered[low - 1]) if low >= 1 else 0.0,
        float(ordered[high - 1]) if high <= n else math.inf,
    )


def _failures(seen: Measured) -> GateReport:
    gate, unit = "benchmark.failures", "failed requests"
    if seen.requests <= 0 or (len(_latency(seen)) == 0 and not seen.failed):
        return GateReport(gate, Verdict.HOLD, "no request was measured", unit=unit, threshold=0.0)
    numbers = figures(seen)
    spread = ", ".join(f"p{q} {numbers[f'latency_ms_p{q}']:.2f}" for q in (50, 90, 99) if f"latency_ms_p{q}" in numbers)
    says = f"{seen.failed} of {seen.requests} requests failed; {seen.throughput_rps:.0f} requests/s, ms: {spread}"
    verdict = Verdict.FAIL if seen.failed else Verdict.PASS
    return GateReport(gate, verdict, says, estimate=float(seen.failed), n=seen.requests, threshold=0.0, unit=unit)


def _latency_slo(seen: Measured, bar_ms: float) -> GateReport:
    gate, values = "benchmark.latency", _latency(seen)
    p99, low, high = quantile(values.tolist(), 0.99)
    n = len(values)
    if n == 0:
        return GateReport(gate, Verdict.HOLD, "no latency was measured", threshold=bar_ms, unit="ms")
    verdict = Verdict.PASS if high <= bar_ms else Verdict.FAIL if low > bar_ms else Verdict.HOLD
    upper = f"{high:.2f}" if math.isfinite(high) else "unbounded"
    says = f"p99 {p99:.2f} ms ({low:.2f} to {upper}) over {n} requests, SLO {bar_ms:g} ms"
    needs = "" if verdict is not Verdict.HOLD else "a longer benchmark: more requests narrow the interval"
    return GateReport(
        gate,
        verdict,
        says,
        estimate=p99,
        low=low,
        high=high if math.isfinite(high) else None,
        n=n,
        threshold=bar_ms,
        unit="ms",
        needs=needs,
    )


def _bar(gate: str, seen: float, bar: float, unit: str, floor: bool) -> GateReport:
    if not math.isfinite(seen) or seen <= 0:
        return GateReport(gate, Verdict.ERROR, f"not measured (the server said {seen:g})", threshold=bar, unit=unit)
    holds = seen >= bar if floor else seen <= bar
    says = f"{seen:.4g} {unit}, {'at least' if floor else 'at most'} {bar:g} asked for"
    return GateReport(gate, Verdict.PASS if holds else Verdict.FAIL, says, estimate=seen, threshold=bar, unit=unit)


def _regression(rules: Benchmark, candidate: Measured, champion: Measured) -> list[GateReport]:
    bar = 1 + rules.regression_max
    reports = []
    for q in REGRESSION_QUANTILES:
        gate = f"benchmark.regression[p{round(100 * q)}]"
        ratio, low, high = _ratio(candidate, champion, q)
        n = len(_latency(candidate))
        if not all(map(math.isfinite, (ratio, low, high))):
            says = "too few requests of one of the versions to compare"
            reports.append(
                GateReport(gate, Verdict.HOLD, says, n=n, threshold=bar, unit="x", needs="a longer benchmark")
            )
            continue
        verdict = Verdict.PASS if high <= bar else Verdict.FAIL if low > bar else Verdict.HOLD
        says = f"{ratio:.2f} times the champion's latency ({low:.2f} to {high:.2f}), at most {bar:.2f} tolerated"
        needs = "a longer benchmark: more requests narrow the interval" if verdict is Verdict.HOLD else ""
        reports.append(
            GateReport(
                gate, verdict, says, estimate=ratio, low=low, high=high, n=n, threshold=bar, unit="x", needs=needs
            )
        )
    reports.append(_throughput(candidate, champion, bar))
    return reports


def _throughput(candidate: Measured, champion: Measured, bar: float) -> GateReport:
    gate = "benchmark.regression[throughput]"
    a, b = candidate.throughput_rps, champion.throughput_rps
    if not (math.isfinite(a) and math.isfinite(b)) or b <= 0:
        return GateReport(gate, Verdict.ERROR, "the throughput was not measured", threshold=bar, unit="x")
    ratio = b / a if a > 0 else math.inf
    says = f"{a:.0f} requests/s against {b:.0f}: {ratio:.2f} times slower, at most {bar:.2f} tolerated"
    verdict = Verdict.PASS if ratio <= bar else Verdict.FAIL
    return GateReport(gate, verdict, says, estimate=_or_none(ratio), n=candidate.requests, threshold=bar, unit="x")


def _ratio(candidate: Measured, champion: Measured, q: float) -> tuple[float, float, float]:
    ends = []
    for seen in (candidate, champion):
        values = quantile(_latency(seen).tolist(), q)
        if not all(math.isfinite(value) and value > 0 for value in values):
            return math.nan, math.nan, math.nan
        ends.append([math.log(value) for value in values])
    (a, a_low, a_high), (b, b_low, b_high) = ends
    low = a - b - math.hypot(a - a_low, b_high - b)
    high = a - b + math.hypot(a_high - a, b - b_low)
    return math.exp(a - b), math.exp(low), math.exp(high)


def _latency(seen: Measured) -> NDArray[np.float64]:
    return _finite(seen.latency_ms)


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    return found[np.isfinite(found)]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
