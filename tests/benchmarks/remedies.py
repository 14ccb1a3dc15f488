"""Cold starts and unequal routing, which would mislead any comparison of rates, in front of the real gates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from policies import gates
from policies.evidence import Evidence
from policies.policy import Policy
from policies.policy_yaml import parse
from policies.verdict import Verdict
from tests.benchmarks.faulty import counts

LOOKS, EVERY_S = 120, 5.0
RPS, SLOW, COLD_S = 50.0, 0.02, 20.0

TEXT = """
policy: remedies
rollout:
  burn_in: {}
  stages: [canary: {{weight: 10, for: 10m}}]
  gates:
    errors: {{margin: 0.01}}
    latency: {{slo_ms: 20, margin: 0.02}}
"""


def cold_starts(rollouts: int, burn_in: str, seed: int) -> float:
    """The share of good versions rolled back that are slow on half of the requests in their first seconds."""
    policy = parse(TEXT.format(burn_in))
    back = 0
    for rollout in range(rollouts):
        looks = _traffic(np.random.default_rng([seed, rollout]), 0.1, cold_s=COLD_S)
        back += any(Verdict.FAIL in verdicts.values() for verdicts in _verdicts(policy, looks))
    return back / rollouts


def routed(rollouts: int, share: float, seed: int) -> tuple[float, float]:
    """Of rollouts whose candidate gets `share` of the requests where a tenth is meant: the share in which the check of
    the traffic ever holds once 200 requests have come, and the share that could ever have been passed after that."""
    policy = parse(TEXT.format("0s"))
    held = passed = 0
    for rollout in range(rollouts):
        looks = list(_verdicts(policy, _traffic(np.random.default_rng([seed, rollout]), share)))[2:]
        held += any(verdicts["traffic"] is Verdict.HOLD for verdicts in looks)
        passed += any(set(verdicts.values()) == {Verdict.PASS} for verdicts in looks)
    return held / rollouts, passed / rollouts


def _traffic(generator: np.random.Generator, share: float, cold_s: float = 0.0) -> Iterator[Evidence]:
    stable = candidate = counts(0)
    for look in range(LOOKS):
        yield Evidence(1000.0 + look * EVERY_S, stable, candidate)
        total = int(generator.poisson(RPS * EVERY_S))
        n = int(generator.binomial(total, share))
        slow = 0.5 if look * EVERY_S < cold_s else SLOW
        sides = []
        for before, more, rate in ((stable, total - n, SLOW), (candidate, n, slow)):
            late = int(generator.binomial(more, rate))
            latency = list(before.latency)
            latency[10] += more - late
            latency[60] += late
            errors = before.errors + int(generator.binomial(more, 0.002))
            sides.append(replace(before, requests=before.requests + more, errors=errors, latency=tuple(latency)))
        stable, candidate = sides


def _verdicts(policy: Policy, looks: Iterator[Evidence]) -> Iterator[dict[str, Verdict]]:
    state = gates.begin(policy)
    for evidence in looks:
        state, reports = gates.look(policy, 0, state, evidence)
        yield gates.verdicts(reports)
