"""A plan for people and for machines, at traffic that was given or is measured on the running platform."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from policies.evidence import LATENCY_EDGES_MS
from policies.plan import Plan, duration, plan
from policies.policy import Policy
from policies.words import freezes
from tasks.ports import BadInput, NotThere, Ports

MEASURED_S = 10.0
_SLOW = 0.01  # where nothing was timed, or no SLO is named


@dataclass(frozen=True)
class Traffic:
    """Requests a second to the stable version, and the shares of them that fail and are slow."""

    rps: float
    error_rate: float = 0.001
    slow_rate: float = _SLOW
    label_lag_s: float = 0.0


def planned(policy: Policy, traffic: Traffic) -> Plan:
    """The plan at this traffic. Raises BadInput for traffic that is none."""
    try:
        return plan(policy, traffic.rps, traffic.error_rate, traffic.slow_rate, traffic.label_lag_s)
    except ValueError as exc:
        raise BadInput(str(exc)) from exc


def measure(ports: Ports, model: str, policy: Policy) -> Traffic:
    """What the model's stable version gets now, watched for ten seconds; its rates since it started.

    Raises PortError if the platform cannot be asked, NotThere if the model has no traffic.
    """
    route = ports.router.current(model)
    if route is None or route.stable is None:
        raise NotThere(f"no version of '{model}' is live; give the expected traffic with --rps")
    first = ports.telemetry.counts(model, route.stable, False)
    began = ports.clock.now()
    ports.clock.sleep(MEASURED_S)
    counts, passed = ports.telemetry.counts(model, route.stable, False), ports.clock.now() - began
    requests = counts.requests - first.requests
    if requests <= 0:
        raise NotThere(f"'{model}' had no request for {MEASURED_S:.0f} s; give the expected traffic with --rps")
    live = max(100 - route.weight, 1) / 100
    gate, timed, slow = policy.rollout.gates.latency, sum(counts.latency), _SLOW
    if gate is not None and timed:
        slow = sum(counts.latency[sum(edge < gate.slo_ms for edge in LATENCY_EDGES_MS) + 1 :]) / timed
    return Traffic(requests / passed / live, min(counts.errors / max(counts.requests, 1), 1.0), slow)


def document(made: Plan, traffic: Traffic, policy: Policy) -> dict[str, Any]:
    """The plan, JSON-able; infinite times are None."""
    freeze = [each.model_dump(by_alias=True) for each in policy.governance.freeze]
    body: dict[str, Any] = {"traffic": asdict(traffic), **asdict(made), "freeze": freeze, "ok": not made.problems}
    return dict(_finite(body))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def lines(made: Plan, traffic: Traffic, policy: Policy) -> list[str]:
    """The plan as text."""
    shares = f"{traffic.error_rate:.2%} of them failing, {traffic.slow_rate:.2%} slow"
    told = [f"At {traffic.rps:.4g} requests a second, {shares}:"]
    for stage in made.stages:
        eta = _time(stage.eta_s)
        told.append(f"{stage.name}: {eta}; {stage.requests:,} requests to the candidate, {stage.exposed:,} of clients")
        for gate in stage.gates:
            seen = "sees no regression" if gate.visible is None else f"sees a regression of {gate.visible:.3g}"
            needs = f"passes below {gate.margin:.3g} after {_time(gate.needs_s)} ({gate.needs:,.0f} seen)"
            told.append(f"  {gate.gate}: {needs}; {seen} by its end")
    told.append(f"Whole rollout: {_time(made.eta_s)}; {made.exposed:,} requests of clients before promotion.")
    return [*told, *freezes(policy.governance.freeze)]


def _time(seconds: float) -> str:
    return "never" if seconds == float("inf") else duration(seconds)
