"""What the gates promise, counted: `python -m tests.benchmarks.bench_gates [--scale 1.0] [--only aa,power,...]`.

Every figure comes from simulated rollouts with a fixed seed, through the functions that judge real ones; the rules of
Kayenta, Flagger and Argo Rollouts judge the very same streams. Prints tables, writes `build/benchmarks/gates.json`
and plots in `build/benchmarks/gates/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta

from policies import gates, stats
from policies.events import Phase
from policies.plan import Plan, plan
from policies.policy import Policy
from policies.policy_yaml import parse
from policies.stats import Margin
from policies.verdict import Verdict
from tests.benchmarks import drifting, faulty, outages, remedies
from tests.benchmarks.gate_plots import draw
from tests.benchmarks.judges import Lockgate
from tests.benchmarks.labelled import quality_alarms
from tests.benchmarks.peers import Argo, Flagger, Judge, Kayenta
from tests.benchmarks.streams import Part, Tick, World, counts, ticks

HOUR = (Part(120, 1.0, copies=True), Part(300, 0.05), Part(600, 0.25), Part(600, 0.5), Part(1980, 0.9, watch=True))
ERRORS, LATENCY = Margin(1.0, 0.005), Margin(1.0, 0.01)
BUDGET, GATES, RUNGS = 0.05, 5, len(HOUR)
Flags = NDArray[np.bool_]


@dataclass
class Report:
    """Checks with a bar, and the numbers behind them."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def check(self, what: str, value: float, bar: str) -> None:
        """One figure against its bar, such as `<= 0.05`."""
        sign, limit = bar.split()
        holds = value <= float(limit) if sign == "<=" else value >= float(limit)
        self.checks.append({"what": what, "value": round(float(value), 5), "bar": bar, "holds": bool(holds)})
        print(f"  {'ok ' if holds else 'NOT'} {what}: {value:.4g} ({bar})", flush=True)


def upper(hits: int, of: int) -> float:
    """The upper 95 % limit of a share (Clopper and Pearson 1934)."""
    return 1.0 if hits >= of else float(beta.ppf(0.95, hits + 1, of - hits))


def peers(rollouts: int) -> list[Judge]:
    """The others' rules."""
    return [Kayenta(rollouts), Flagger(rollouts), Argo(rollouts, 0), Argo(rollouts, 3)]


def ours(rollouts: int, parts: Sequence[Part] = HOUR, errors: Margin = ERRORS) -> Lockgate:
    """The gates on rates, with their share of the budget."""
    return Lockgate(rollouts, max(len(parts), 2), errors, LATENCY, BUDGET, GATES)


def drive(world: World, parts: tuple[Part, ...], tick_s: float, seed: int, judges: Sequence[Judge]) -> None:
    """All judges look at every tick; ends early when all have rolled back everything."""
    for tick in ticks(world, parts, tick_s, seed):
        for judge in judges:
            judge.tick(tick)
        if all(judge.failed.all() for judge in judges):
            return


# ---------------------------------------------------------------- 1 and 4: nothing is wrong


def drift_alarms(rollouts: int, rows: int, seed: int, shift: float = 0.0, threshold: float = 0.1) -> Flags:
    """Who is rolled back by the drift gate with its share of the budget."""
    return drifting.drift_alarms(rollouts, rows, HOUR, BUDGET / GATES, seed, shift, threshold)


def disagreement_alarms(rollouts: int, margin: float, share: float, seed: int) -> tuple[Flags, NDArray[np.float64]]:
    """Who is rolled back by the pairs of 100 looks, and after how many pairs."""
    generator = np.random.default_rng(seed)
    n = np.cumsum(generator.poisson(10 ** generator.uniform(0, 3, rollouts)[:, None], (rollouts, 100)), axis=1)
    k = np.cumsum(generator.binomial(np.diff(n, axis=1, prepend=0), share), axis=1)
    over = stats.share_above(n, k, margin) >= -np.log(BUDGET / GATES)
    first = np.where(over.any(axis=1), n[np.arange(rollouts), over.argmax(axis=1)], np.nan)
    return over.any(axis=1), first


def aa(report: Report, scale: float) -> None:
    """Healthy candidates: who is rolled back?"""
    rollouts = max(int(2000 * scale), 50)
    rps = 10 ** np.random.default_rng(7).uniform(0.0, 3.0, rollouts)
    drifted = drift_alarms(rollouts, 300, seed=21)
    differing, _ = disagreement_alarms(rollouts, 0.05, 0.05, seed=22)
    mislabelled, _ = quality_alarms(rps, HOUR, 0.0, 0.02, BUDGET / GATES, 300.0)
    # At the very edge of what is tolerated, where alarms are likeliest: half the margin worse.
    edge, _ = quality_alarms(rps, HOUR, 0.01, 0.02, BUDGET / GATES, 300.0, seed=62)
    report.check("quality, half the margin worse: rolled back", float(edge.mean()), f"<= {BUDGET / GATES}")
    # A distance at the threshold is tolerated; half as much again over the share, for the error of this count.
    edge = drift_alarms(max(rollouts // 2, 50), 1000, seed=23, shift=0.1)
    report.check("drift, exactly at the threshold: rolled back", float(edge.mean()), f"<= {1.5 * BUDGET / GATES}")
    for name, incidents in (("A/A", 0.0), ("A/A with outages of both", 1.0)):
        world = World(rps, outages=incidents)
        judges: list[Judge] = [ours(rollouts), *peers(rollouts)]
        drive(world, HOUR, 10.0, 1, judges)
        table = {judge.name: float(judge.failed.mean()) for judge in judges}
        union = judges[0].failed | drifted | differing | mislabelled
        table["lockgate, all gates"] = float(union.mean())
        report.raw[name] = {"rollouts": rollouts, "looks": 360, "rolled back": table}
        print(f"  {name}: rolled back: " + ", ".join(f"{who} {share:.1%}" for who, share in table.items()))
        report.check(f"{name}: rolled back (upper 95 % limit)", upper(int(union.sum()), rollouts), f"<= {BUDGET}")
    clustered = ours(rollouts)
    declared = Lockgate(rollouts, RUNGS, ERRORS, LATENCY, BUDGET, GATES, cluster=5.0)
    drive(World(rps, errors=0.005, cluster=5), HOUR, 10.0, 2, [clustered, declared])
    report.raw["A/A, errors in clusters of five"] = {
        "undeclared": float(clustered.failed.mean()), "cluster: 5": float(declared.failed.mean()),
    }  # fmt: skip
    report.check("A/A, clusters of five, declared", upper(int(declared.failed.sum()), rollouts), f"<= {BUDGET}")
    print(f"      undeclared, noticed on the way: {clustered.failed.mean():.1%}")


# ---------------------------------------------------------------- 2 and 4: something is wrong


def power(report: Report, scale: float) -> None:
    """Bad candidates: who is caught, and after how many of the candidate's requests?"""
    rollouts = max(int(200 * scale), 40)
    canary = (Part(3600, 0.10),)
    base = World(np.full(rollouts, 100.0), restless=False)
    cases = {
        "errors 0.5 -> 1 %": replace(base, errors=0.005, errors_candidate=0.01),
        "errors 1 -> 5 %": replace(base, errors=0.01, errors_candidate=0.05),
        "latency x 1.2 (2 -> 4.6 % slow)": replace(base, slow=0.02, slow_candidate=0.0456),
        "latency x 2 (2 -> 25 % slow)": replace(base, slow=0.02, slow_candidate=0.251),
    }
    for name, world in cases.items():
        judges: list[Judge] = [ours(rollouts, canary)]
        judges += peers(rollouts) if world.errors_candidate is not None else []
        drive(world, canary, 2.0, 3, judges)
        rows = {judge.name: _caught(judge.failed, judge.requests) for judge in judges}
        report.raw[name] = rows
        for who, row in rows.items():
            _tell(name, who, row)
        report.check(f"{name}: caught within an hour at 10 rps", rows["lockgate"]["caught"], ">= 0.95")
    few = max(int(60 * scale), 20)
    for shift, threshold in ((0.3, 0.1), (0.1, 0.05)):
        name = f"predictions shifted by {shift} sd (threshold {threshold})"
        row = _caught(*drifting.drift_detection(few, canary, 100.0, BUDGET / GATES, 34, shift, threshold))
        report.raw[name] = {"lockgate": row}
        _tell(name, "lockgate", row)
        report.check(f"{name}: caught within an hour at 10 rps", row["caught"], ">= 0.95")
    for shift, threshold, rows, bar in ((0.3, 0.1, 3000, 0.95), (0.1, 0.05, 10_000, 0.95), (0.1, 0.05, 3000, None)):
        found = float(drift_alarms(few, rows, 31, shift, threshold).mean())
        name = f"shift of {shift} sd (threshold {threshold}) in windows of {rows:,} rows, three looks a stage: caught"
        if bar is None:
            print(f"      {name}: {found:.0%}")
        else:
            report.check(name, found, f">= {bar}")
    over, pairs = disagreement_alarms(rollouts, 0.002, 0.01, 33)
    enough = _pairs_seen(rollouts, 33) > 3000
    name = "1 % of answers flipped in shadow (margin 0.2 %)"
    report.raw[name] = {"lockgate": _caught(over[enough], pairs[enough])}
    _tell(name, "lockgate", report.raw[name]["lockgate"])
    report.check(f"{name}: caught, of those with 3,000 pairs", over[enough].mean(), ">= 0.95")
    quality(report, rollouts)


def quality(report: Report, rollouts: int) -> None:
    """Labels of four answers in five come, ten minutes late. Pairs show in minutes what takes a canary hours."""
    rps = np.full(rollouts, 100.0)
    shadow, canary = (Part(900, 1.0, copies=True), Part(2700, 0.10)), (Part(3600, 0.10),)
    for name, parts, worse, margin, bar in (
        ("quality -1 point, margin 1 point, shadow 15 min, canary 10 %", shadow, 0.01, 0.01, 0.95),
        ("quality -5 points, margin 2 points, shadow 15 min, canary 10 %", shadow, 0.05, 0.02, 0.95),
        ("quality -5 points, margin 2 points, canary 10 % alone", canary, 0.05, 0.02, 0.95),
        ("quality -1 point, margin 1 point, canary 10 % alone", canary, 0.01, 0.01, None),
    ):
        row = _caught(*quality_alarms(rps, parts, worse, margin, BUDGET / GATES, 600.0, seed=63))
        report.raw[name] = {"lockgate": row}
        _tell(name, "lockgate", row)
        if bar is not None:
            report.check(f"{name}: caught within an hour", row["caught"], f">= {bar}")


def _pairs_seen(rollouts: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return generator.poisson(10 ** generator.uniform(0, 3, rollouts)[:, None], (rollouts, 100)).sum(axis=1)


def _tell(name: str, who: str, row: dict[str, Any]) -> None:
    median, late = ("-" if row[key] is None else f"{row[key]:,.0f}" for key in ("median", "p95"))
    print(f"  {name}: {who}: caught {row['caught']:.0%}, median {median}, p95 {late} requests")


def _caught(failed: Flags, requests: NDArray[np.float64]) -> dict[str, Any]:
    seen = requests[failed]
    median, late = (float(np.quantile(seen, q)) if len(seen) else None for q in (0.5, 0.95))
    return {"caught": float(failed.mean()), "median": median, "p95": late}


# ---------------------------------------------------------------- 3: promotion is earned

PLANNED = """
policy: planned
rollout:
  burn_in: 0s
  patience: 30m
  stages:
    - shadow: {{share: 1.0, for: 2m}}
    - canary: {{weight: 10, for: {0}}}
    - canary: {{weight: 50, for: {1}}}
  gates:
    errors: {{margin: {2}}}
    latency: {{slo_ms: 20, margin: {3}}}
  watch: {{for: 2m, shadow: 0.5}}
"""


def promote(report: Report, scale: float) -> None:
    """Rollouts that move from stage to stage by their verdicts."""
    rollouts = max(int(400 * scale), 40)
    for name, policy, rps, errors, slow in (
        ("50 rps, margin 1 point", parse(PLANNED.format("5m", "5m", 0.01, 0.02)), 50.0, 0.002, 0.01),
        ("10 rps, margin 2 points", parse(PLANNED.format("10m", "10m", 0.02, 0.03)), 10.0, 0.005, 0.02),
        ("200 rps, margin 2x", parse(PLANNED.format("10m", "10m", "2x", "2x")), 200.0, 0.005, 0.02),
    ):
        made = plan(policy, rps, errors, slow)
        if made.problems:
            raise AssertionError(f"{name} is not a plan that holds: {made.problems}")
        assert policy.rollout.gates.errors is not None
        worse = float(gates.tolerated(policy.rollout.gates.errors).beyond(errors))
        equal = World(np.full(rollouts, rps), errors, slow)
        good, took = _machine(policy, made, equal, 41)
        bad, _ = _machine(policy, made, replace(equal, errors_candidate=worse), 42)
        report.check(f"{name}: promoted, no worse than the margin but at it", float(bad.mean()), "<= 0.05")
        report.check(f"{name}: promoted, equal to the stable version", float(good.mean()), ">= 0.9")
        near = np.abs(took - made.eta_s) <= 0.2 * made.eta_s
        report.check(f"{name}: within 20 % of the planned {made.eta_s:.0f} s", float(near.mean()), ">= 0.9")


def _machine(policy: Policy, made: Plan, world: World, seed: int) -> tuple[Flags, NDArray[np.float64]]:
    """(promoted, when) of rollouts looked at every five seconds, with the policy's patience."""
    generator = np.random.default_rng(seed)
    rollouts, tick_s = len(world.rps), 5.0
    rules = policy.rollout
    assert rules.gates.errors is not None
    assert rules.gates.latency is not None
    margins = gates.tolerated(rules.gates.errors), gates.tolerated(rules.gates.latency)
    judge = Lockgate(rollouts, gates.rungs(policy), *margins, budget=rules.error_budget, gates=2)
    parts = [Part(s.length_s, s.canary.weight / 100 if s.canary else 1.0, s.shadow is not None) for s in rules.stages]
    parts.append(Part(rules.watch.length, 1.0 - rules.watch.shadow, watch=True))
    lengths = np.array([part.seconds for part in parts])
    stage, since = np.zeros(rollouts, dtype=int), np.zeros(rollouts)
    done, took = np.zeros(rollouts, dtype=bool), np.full(rollouts, np.inf)
    at, never = 0.0, np.zeros(rollouts, dtype=bool)
    while at < made.eta_s + 3600.0 and not (done | judge.failed).all():
        each = [counts(world, part, tick_s, at, never, generator) for part in parts]
        seen = [np.choose(stage, [values[i] for values in each]) for i in range(6)]
        at += tick_s
        judge.tick(Tick(stage, at, *seen))
        ready = judge.passes() & (at - since >= lengths[stage]) & ~judge.failed & ~done
        over = at - since > lengths[stage] + rules.patience
        judge.failed |= over & ~done & ~ready
        last = ready & (stage == len(parts) - 1)
        took[last], done = at, done | last
        moved = ready & ~last
        stage, since = np.where(moved, stage + 1, stage), np.where(moved, at, since)
    return done, took


# ---------------------------------------------------------------- 5, 6, 7


def faults(report: Report, scale: float) -> None:
    """Broken evidence in front of a rollout that is about to pass; and sources that are down, up to their grace."""
    cases = max(int(1000 * scale), 20)
    said: list[Verdict] = []
    for gate in faulty.GATES:
        for kind in faulty.KINDS:

            def look(draw: random.Random, gate: str = gate, kind: str = kind) -> None:
                made = faulty.case(gate, kind, draw, longest=3)
                said.extend({verdict for both in made.verdicts(gate) for verdict in both})

            _generated(cases, look)
    of = f"{len(faulty.GATES)} gates x {len(faulty.KINDS)} faults x {cases:,} cases of broken evidence"
    report.check(f"{of}: passed", said.count(Verdict.PASS), "<= 0")
    report.check(f"{of}: failed", said.count(Verdict.FAIL), "<= 0")
    ended: list[outages.Walk] = []
    for source in outages.SOURCES:

        def play(draw: random.Random, source: str = source) -> None:
            ended.append(outages.walk(draw, source))

        _generated(cases, play)
    of = f"{len(ended):,} rollouts with sources down, each time for less than the grace"
    report.check(f"{of}: not promoted", sum(each.machine.phase is not Phase.PROMOTED for each in ended), "<= 0")
    report.check(f"{of}: moved on by a look that could not look", sum(each.blind_moves for each in ended), "<= 0")


def _generated(cases: int, take: Callable[[random.Random], None]) -> None:
    """So many cases, drawn by Hypothesis; the same ones in each run."""

    @hypothesis.settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(st.integers(0, 2**32 - 1))
    def each(seed: int) -> None:
        take(random.Random(seed))

    each()


def remedied(report: Report, scale: float) -> None:
    """What would mislead a comparison of rates, and what is done about it. (Clusters: see `aa`.)"""
    rollouts = max(int(100 * scale), 20)
    cold = remedies.cold_starts(rollouts, "0s", 71)
    print(
        f"      cold starts, half of the requests slow for {remedies.COLD_S:.0f} s, no burn-in: rolled back {cold:.0%}"
    )
    report.check("cold starts, burn-in of 30 s: rolled back", remedies.cold_starts(rollouts, "30s", 71), "<= 0.05")
    held, passed = remedies.routed(rollouts, 0.25, 72)
    report.check("a quarter of the requests where a tenth is meant: held", held, ">= 0.95")
    report.check("a quarter of the requests where a tenth is meant: could have been passed", passed, "<= 0.05")
    held, passed = remedies.routed(rollouts, 0.10, 73)
    report.check("a tenth of the requests as meant: held", held, "<= 0.05")
    report.check("a tenth of the requests as meant: could have been passed", passed, ">= 0.95")


def world_drift(report: Report, scale: float) -> None:
    """The world moves under both versions; then a model that moves by itself."""
    for rows, rollouts in ((100, 200), (1000, 200), (10_000, 60), (100_000, 60)):
        few = max(int(rollouts * scale), 20)
        share = drift_alarms(few, rows, 51).mean()
        report.check(f"the world drifts, windows of {rows:,} rows: rolled back", share, "<= 0.05")
    for rows in (1000, 10_000):
        found = drift_alarms(max(int(60 * scale), 20), rows, 52, shift=0.3).mean()
        report.check(f"the model shifts by 0.3 sd, windows of {rows:,} rows: caught", found, ">= 0.95")


def cost(report: Report, _scale: float) -> None:
    """One look at all gates, alternating between little and much traffic."""
    times: dict[int, list[float]] = {1_000: [], 1_000_000: []}
    state = faulty.about_to_pass(1)
    for _ in range(300):
        for requests, seen in times.items():
            n = requests + 8000
            counts = replace(faulty.healthy(41), stable=faulty.counts(n, n // 500), candidate=faulty.counts(n))
            began = time.perf_counter()
            gates.look(faulty.POLICY, 1, state, counts)
            seen.append(1000.0 * (time.perf_counter() - began))
    medians = {requests: float(np.median(seen)) for requests, seen in times.items()}
    for requests, seen in times.items():
        report.check(f"one look at {requests:,} requests, median ms", medians[requests], "<= 20")
        report.raw[f"look ms at {requests}"] = {"median": medians[requests], "p95": float(np.quantile(seen, 0.95))}
    report.check("a look at 1,000,000 requests over one at 1,000", medians[1_000_000] / medians[1_000], "<= 1.2")


# ---------------------------------------------------------------- the table


def table(raw: dict[str, Any]) -> list[str]:
    """Ours beside the peers, on the same streams: false rollbacks; share caught and requests until then."""
    lines = []
    for name, body in raw.items():
        for who, share in body.get("rolled back", {}).items():
            lines.append(f"  {name[:62]:62}  {who:22} {share:7.1%}")
    lines.append(f"  {'':62}  {'':22} {'missed':>7} {'median':>9} {'p95':>9} requests until caught")
    for name, body in raw.items():
        for who, row in body.items():
            if isinstance(row, dict) and "caught" in row:
                numbers = (f"{row[key]:,.0f}" if row[key] is not None else "-" for key in ("median", "p95"))
                lines.append(
                    f"  {name[:62]:62}  {who:22} {1.0 - row['caught']:7.1%} " + " ".join(f"{n:>9}" for n in numbers)
                )
    return lines


SECTIONS: dict[str, Callable[[Report, float], None]] = {
    "aa": aa, "power": power, "promote": promote, "faults": faults, "world": world_drift, "remedies": remedied,
    "cost": cost,
}  # fmt: skip


def main() -> int:
    """Runs the sections; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the simulated rollouts")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma separated")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/gates.json"))
    chosen = parser.parse_args()
    report, began = Report(), time.time()
    for name in chosen.only.split(","):
        print(f"{name} ({time.time() - began:.0f} s)", flush=True)
        SECTIONS[name](report, chosen.scale)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    body = {**asdict(report), "machine": {**machine, "seconds": round(time.time() - began, 1)}}
    chosen.out.write_text(json.dumps(body, indent=1))
    for path in draw(report.raw, chosen.out.parent / "gates"):
        print(f"  {path}")
    print("healthy versions rolled back, bad ones missed:", *table(report.raw), sep="\n")
    missed = [check["what"] for check in report.checks if not check["holds"]]
    print(f"{len(report.checks) - len(missed)} of {len(report.checks)} hold; {time.time() - began:.0f} s; {chosen.out}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
