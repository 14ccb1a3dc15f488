"""What a rollout will take and show, said before anything moves.

`plan` answers from the policy and the expected traffic: how long each stage will be, how much evidence each gate needs
to pass it, the smallest regression each gate would see, and how many requests a bad version would answer until then.
Where a gate could hardly pass a stage in the time that the policy gives, that is a problem, with what would mend it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from policies import evidence, gates, labels, rates, shifts, stats
from policies.policy import Drifting, Errors, Labelled, Latency, Policy
from policies.stats import Margin

POWER = 0.95
_Z = 1.645  # the normal quantile of POWER
# To pass: 1/0.05, half of the stake on this stage alone, and some for guessing the common rate while it is learned.
_PASS = -math.log(1.0 - rates.CONFIDENCE) + math.log(2.0) + 0.5
# What the drift detector's upper limit stays below in four of five comparisons of equal windows, over sqrt(1/n + 1/m):
# measured (2.8 in the median); a stage has several comparisons.
_NOISE = 3.3


@dataclass(frozen=True)
class GatePlan:
    """One gate in one stage: the margin it is held to, the candidate's requests (or rows, or pairs) that it needs to
    pass with 95 % chance, the seconds until they have come, and the smallest regression seen with 95 % chance by the
    end of the stage (None where it sees none)."""

    gate: str
    margin: float
    needs: float
    needs_s: float
    visible: float | None


@dataclass(frozen=True)
class StagePlan:
    """One stage: its least time and the expected one, in seconds; the candidate's requests in it, and those of clients
    among them."""

    name: str
    length_s: float
    eta_s: float
    requests: int
    exposed: int
    gates: tuple[GatePlan, ...]


@dataclass(frozen=True)
class Plan:
    """The whole rollout. `exposed` clients' requests go to the candidate before it is promoted."""

    stages: tuple[StagePlan, ...]
    eta_s: float
    exposed: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Flow:
    """Requests a second that both versions see in one stage; `live` of the candidate's come from clients."""

    name: str
    length_s: float
    candidate: float
    stable: float
    live: float
    burn_s: float = 0.0

    @property
    def counted_s(self) -> float:
        return max(self.length_s - self.burn_s, 0.0)


def plan(
    policy: Policy, rps: float, error_rate: float = 0.001, slow_rate: float = 0.01, label_lag_s: float = 0.0
) -> Plan:
    """The plan at `rps` requests a second, of which `error_rate` fail and `slow_rate` are slow in the stable version.

    Each answer's label comes `label_lag_s` after it.

    Raises ValueError for traffic that is none, or for rates that are not shares.
    """
    if not (math.isfinite(rps) and rps > 0):
        raise ValueError(f"{rps} requests a second is no traffic; give a number above 0")
    for name, rate in (("error rate", error_rate), ("share of slow requests", slow_rate)):
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"the {name} is {rate}; give a share from 0 to 1")
    if not (math.isfinite(label_lag_s) and label_lag_s >= 0):
        raise ValueError(f"labels cannot lag by {label_lag_s} seconds; give 0 or more")
    flows = _flows(policy, rps)
    stages, problems = [], []
    for index, flow in enumerate(flows):
        asked = _gates(policy, flows, index, error_rate, slow_rate)
        quality = policy.rollout.gates.quality
        if quality is not None and quality.required and index == len(policy.rollout.stages) - 1:
            asked = (*asked, _of_labels(quality, flows[: index + 1], label_lag_s, gates.alpha(policy)))
        slowest = max((gate.needs_s for gate in asked), default=0.0)
        stages.append(
            StagePlan(
                name=flow.name,
                length_s=flow.length_s,
                eta_s=max(flow.length_s, slowest),
                requests=round(flow.candidate * flow.length_s),
                exposed=round(flow.live * flow.length_s),
                gates=asked,
            )
        )
        problems += [_problem(policy, flow, gate) for gate in asked if gate.needs_s > flow.length_s]
        if not asked and flow.length_s > 0:
            problems.append(
                f"{flow.name}: no gate is asked, so only a person's word passes it; ask `errors` or `latency`"
            )
    before = stages[: len(policy.rollout.stages)]
    return Plan(tuple(stages), sum(s.eta_s for s in stages), sum(s.exposed for s in before), tuple(problems))


def _flows(policy: Policy, rps: float) -> tuple[_Flow, ...]:
    flows = []
    for index, stage in enumerate(policy.rollout.stages):
        burn = policy.rollout.burn_in if index == 0 else 0.0
        if stage.canary is not None:
            weight = stage.canary.weight / 100.0
            candidate, stable, live = rps * weight, rps * (1.0 - weight), rps * weight
        else:
            candidate, stable, live = rps * stage.share, rps, 0.0
        flows.append(_Flow(stage.name, stage.length_s, candidate, stable, live, burn))
    watch = policy.rollout.watch
    return (*flows, _Flow("watch", watch.length, rps, rps * watch.shadow, rps))


def _gates(
    policy: Policy, flows: tuple[_Flow, ...], index: int, error_rate: float, slow_rate: float
) -> tuple[GatePlan, ...]:
    asked = policy.rollout.gates
    found: list[GatePlan] = []
    for name, gate, rate in (("errors", asked.errors, error_rate), ("latency", asked.latency, slow_rate)):
        if gate is not None:
            found.append(_of_rates(policy, name, gate, flows, index, rate))
    flow, factor = flows[index], gates.factors(policy)[index]
    if asked.drift is not None:
        scene = shifts.Scene(0.0, flow.length_s, len(flows), factor, gates.alpha(policy))
        found.append(_of_drift(asked.drift, flows, index, scene))
    if asked.disagreement is not None and (index == len(flows) - 1 or flow.live == 0.0):
        bound = min(asked.disagreement.margin * factor, 0.999)
        pairs = _first(lambda n: float(stats.share_below(n, 0, bound)) >= -math.log(1.0 - rates.CONFIDENCE))
        both = sum(f.candidate * f.counted_s for f in flows[: index + 1] if f.live == 0.0)
        visible = _least(lambda d: _sees_share(both, asked.disagreement.margin, d, gates.alpha(policy)))  # type: ignore[union-attr]
        had = sum(f.candidate * f.counted_s for f in flows[:index] if f.live == 0.0)
        pace = min(flow.candidate, flow.stable)
        needs_s = flow.burn_s + max(pairs - had, 1.0) / pace if pace > 0 else math.inf
        found.append(GatePlan("disagreement", bound, pairs, needs_s, visible))
    return tuple(found)


def _of_drift(gate: Drifting, flows: tuple[_Flow, ...], index: int, scene: shifts.Scene) -> GatePlan:
    """Rows of the earlier stages count, up to those that the detector takes."""
    most = float(evidence.rows_max(gate.method))
    flow, limit = flows[index], gate.threshold * scene.factor
    had = [sum(pace * f.counted_s for f, pace in _paces(flows[:index], arm)) for arm in ("candidate", "stable")]

    def rows(seconds: float) -> tuple[float, float]:
        return had[0] + flow.candidate * seconds, had[1] + flow.stable * seconds

    def noise(seconds: float) -> float:
        return math.sqrt(sum(1.0 / max(min(n, most), 1e-9) for n in rows(seconds)))

    counted = _first(lambda s: min(rows(s)) >= gate.rows_min and _NOISE * noise(s) < limit)
    end = flow.counted_s
    # The standard error of a distance, in standard deviations of the rows, is at most that of a difference of means.
    beyond = shifts.standard_errors(scene.alpha_distance / len(gate.columns)) + _Z
    visible = gate.threshold + beyond * noise(end) if min(rows(end)) >= gate.rows_min else None
    needs = rows(counted)[0] if math.isfinite(counted) else math.inf
    return GatePlan("drift", limit, needs, flow.burn_s + counted, visible)


def _of_labels(gate: Labelled, flows: tuple[_Flow, ...], lag_s: float, alpha: float) -> GatePlan:
    """In the last stage before promotion: rows of all stages count, once their labels have come.

    The losses vary as `labels.SPREAD` assumes.
    """
    before, flow = sum(f.length_s for f in flows[:-1]), flows[-1]

    def rows(seconds: float) -> tuple[float, float, float]:
        """(pairs, the candidate's alone, the stable version's alone), so many seconds into the last stage."""
        left, found = before + seconds - lag_s, [0.0, 0.0, 0.0]
        for index, each in enumerate(flows):
            length = math.inf if index == len(flows) - 1 else each.length_s
            counted = max(min(left, length) - each.burn_s, 0.0)
            left -= min(max(left, 0.0), length)
            if each.live == 0.0:
                found[0] += each.candidate * counted
            else:
                found[1] += each.candidate * counted
                found[2] += each.stable * counted
        return found[0], found[1], found[2]

    def enough(seconds: float) -> bool:
        pairs, own, other = rows(seconds)
        few = pairs + min(own, other) < gate.rows_min
        return not few and labels.shown(pairs, own, other, gate.margin, gate.metric, _Z)

    needs_s = _first(enough)
    pairs, own, _ = rows(needs_s) if math.isfinite(needs_s) else (math.inf, 0.0, 0.0)
    visible = _least(lambda worse: _sees_loss(gate, rows(flow.length_s), worse, alpha))
    return GatePlan("quality", gate.margin, pairs + own, needs_s, visible)


def _sees_loss(gate: Labelled, rows: tuple[float, float, float], worse: float, alpha: float) -> bool:
    """A loss beyond half the margin is seen like the lack of one below it, with another confidence."""
    beyond = worse - 0.5 * gate.margin
    return beyond > 0 and labels.shown(*rows, min(beyond, 0.999), gate.metric, _Z, alpha)


def _paces(flows: tuple[_Flow, ...], arm: str) -> list[tuple[_Flow, float]]:
    return [(flow, float(getattr(flow, arm))) for flow in flows]


# ---------------------------------------------------------------- rates


def _of_rates(
    policy: Policy, name: str, gate: Errors | Latency, flows: tuple[_Flow, ...], index: int, rate: float
) -> GatePlan:
    ladder = gates.margins(policy, gate)
    margin, rate = ladder[index], min(max(rate, 1e-6), 0.95)
    earlier = [(f.candidate * f.counted_s, _gain(rate, f, margin)) for f in flows[:index]]
    flow = flows[index]
    mean, variance = _gain(rate, flow, margin)
    had = sum(n * gain[0] for n, gain in earlier), sum(n * gain[1] for n, gain in earlier)

    def shown(n: float) -> bool:
        score = had[0] + n * mean / gate.cluster
        return score - _Z * math.sqrt((had[1] + n * variance) / gate.cluster) >= _PASS

    needs = max(_first(shown), gates.REQUESTS_MIN / max(min(1.0, flow.stable / max(flow.candidate, 1e-9)), 1e-9))
    needs_s = flow.burn_s + needs / flow.candidate if flow.candidate > 0 else math.inf
    seen, every = flows[: index + 1], policy.rollout.look_every
    worst = 1.0 - rate
    visible = _least(lambda d: d < worst and _sees(seen, rate, d, gates.alpha(policy), gate.cluster, every))
    half = float(ladder[-1].times(0.5).beyond(rate)) - rate
    threshold = float(margin.beyond(rate)) - rate
    return GatePlan(name, threshold, needs, needs_s, None if visible is None else max(visible, half))


def _gain(rate: float, flow: _Flow, margin: Margin) -> tuple[float, float]:
    """Mean and variance of what one request of the candidate (and what the stable version gets meanwhile) adds."""
    other = flow.stable / max(flow.candidate, 1e-9)
    if flow.candidate <= 0:
        return 0.0, 0.0
    x_c, x_s = (float(x) for x in stats.project(rate, rate, 1.0, other, margin.ratio, margin.shift))
    mean = variance = 0.0
    for n, x in ((1.0, x_c), (other, x_s)):
        event, none = math.log(rate / x), math.log((1.0 - rate) / (1.0 - x))
        mean += n * (rate * event + (1.0 - rate) * none)
        variance += n * rate * (1.0 - rate) * (event - none) ** 2
    return mean, variance


def _sees(flows: tuple[_Flow, ...], rate: float, worse: float, alpha: float, cluster: int, every_s: float) -> bool:
    """Whether a candidate that fails by `worse` more is called worse with 95 % chance by the end of the flows."""
    looks = max(sum(flow.counted_s for flow in flows) / every_s, 1.0)
    needed = -math.log(alpha) + math.log(2.0)
    best = -math.inf
    for ratio in stats.ALARM_RATIOS:
        mean = variance = 0.0
        for flow in flows:
            c, s = flow.candidate * flow.counted_s, flow.stable * flow.counted_s
            if c + s <= 0:
                continue
            both = math.log((c + s) / (c * ratio + s))
            for events, each in ((c * (rate + worse), math.log(ratio) + both), (s * rate, both)):
                mean += events * each / cluster
                variance += events * each**2 / cluster
        peak = max(2.0 * mean / looks - rates.ONE_LOOK, 0.0)  # what the most telling look adds, and does not count
        best = max(best, mean - _Z * math.sqrt(variance) - peak)
    return best - math.log(len(stats.ALARM_RATIOS)) >= needed


def _sees_share(n: float, bound: float, worse: float, alpha: float) -> bool:
    share = min(bound + worse, 1.0)
    k = n * share - _Z * math.sqrt(n * share * (1.0 - share))
    return k > 0 and float(stats.share_above(n, min(k, n), min(bound, 0.999))) >= -math.log(alpha)


def _first(enough: Callable[[float], bool], limit: float = 1e10) -> float:
    """The smallest number (to 1 %) for which `enough` holds, as it then does for all larger ones; infinite if none."""
    high = 1.0
    while not enough(high):
        high *= 2.0
        if high > limit:
            return math.inf
    low = high / 2.0
    while high - low > 0.01 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _least(seen: Callable[[float], bool]) -> float | None:
    """The smallest of a grid of effects (5 % apart) that is seen; None if none is."""
    return next((float(effect) for effect in np.geomspace(1e-5, 1.0, 236) if seen(float(effect))), None)


# ---------------------------------------------------------------- in words


def _problem(policy: Policy, flow: _Flow, gate: GatePlan) -> str:
    unit = {"drift": "sampled rows", "disagreement": "pairs", "quality": "labelled requests"}.get(
        gate.gate, "requests to the candidate"
    )
    text = f"{flow.name}: '{gate.gate}' can hardly rule out {_margin_words(gate)} in {duration(flow.length_s)}"
    if not math.isfinite(gate.needs_s):
        return f"{text} at any length: give the candidate traffic, or a wider margin"
    text += f": it needs {gate.needs:,.0f} {unit}, the stages before included; {flow.candidate:,.3g} come a second"
    mend = [f"`for: {duration(gate.needs_s)}`"]
    stage = next((s for s in policy.rollout.stages if s.name == flow.name), None)
    if stage is not None and stage.canary is not None:
        weight = math.ceil(stage.canary.weight * gate.needs_s / flow.length_s)
        if weight < 100:
            mend.append(f"weight {weight}")
    return f"{text}. What would mend it: {', '.join(mend)}, or a wider margin"


def _margin_words(gate: GatePlan) -> str:
    if gate.gate == "quality":
        return f"a mean loss higher by {gate.margin:.3g}"
    if gate.gate in ("errors", "latency"):
        return f"{100 * gate.margin:.3g} points more"
    return f"a distance of {gate.margin:.3g}" if gate.gate == "drift" else f"{gate.margin:.2%} other answers"


def duration(seconds: float) -> str:
    """Seconds as a policy writes them, rounded up: 45s, 12m, 3h."""
    for unit, size in (("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        if seconds <= 120.0 * size or unit == "h":
            return f"{math.ceil(seconds / size)}{unit}"
    raise AssertionError("unreachable: hours hold any length")
