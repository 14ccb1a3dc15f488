"""A fake Telemetry: each version serves at a steady rate with given shares of errors and slow requests.

Counts grow with the fake clock from when a version first got traffic, exactly as its share says (no chance in it);
`down` makes every source raise PortError, `silent` makes counters stand still, `labelled` is the share of the answers
whose label has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.evidence import LATENCY_EDGES_MS, ColumnDrift, Counts, Drift, Outcomes, Pairs, Sums
from tasks.ports import NotThere, PortError
from tests.fakes.clock import FakeClock
from tests.fakes.router import FakeRouter


@dataclass(frozen=True)
class Behaviour:
    """How a version behaves: shares of failing, of slow and of wrongly answered requests, and the distance of its
    predictions."""

    errors: float = 0.0
    slow: float = 0.0
    shift: float = 0.0
    wrong: float = 0.1


class FakeTelemetry:
    """`tasks.ports.Telemetry` from the router's route, the clock and a behaviour per version."""

    def __init__(self, clock: FakeClock, router: FakeRouter, rps: float = 200.0) -> None:
        self.clock, self.router, self.rps = clock, router, rps
        self.behaviour: dict[str, Behaviour] = {}
        self.down = False
        self.silent = False
        self.labelled = 1.0
        self.requests: dict[tuple[str, str, bool], float] = {}
        self._at, self._served = clock.monotonic, clock.now()
        clock.alarms.insert(0, self._serve)  # before leases run out: that traffic was served

    def _serve(self) -> None:
        passed, self._at = self.clock.monotonic - self._at, self.clock.monotonic
        if self.silent:
            return
        self._served = self.clock.now()
        for model, held in self.router.held.items():
            route = held.route
            live = self.rps * passed
            if route.candidate:
                self._add(model, route.candidate, False, live * route.weight / 100)
                copied = live * route.shadow / 100
                turned = route.weight == 100
                self._add(model, (route.stable if turned else route.candidate) or "", True, copied)
            if route.stable:
                self._add(model, route.stable, False, live * (100 - route.weight) / 100)

    def _add(self, model: str, version: str, shadow: bool, requests: float) -> None:
        key = (model, version, shadow)
        self.requests[key] = self.requests.get(key, 0.0) + requests

    def warm(self) -> None:
        self._up()

    def counts(self, model: str, version: str, shadow: bool) -> Counts:
        self._up()
        requests = int(self.requests.get((model, version, shadow), 0.0))
        acts = self.behaviour.get(version, Behaviour())
        slow = int(requests * acts.slow)
        latency = [0] * (len(LATENCY_EDGES_MS) + 1)
        latency[next(i for i, edge in enumerate(LATENCY_EDGES_MS) if edge >= 2.0)] = requests - slow
        latency[next(i for i, edge in enumerate(LATENCY_EDGES_MS) if edge >= 500.0)] = slow
        return Counts(requests, int(requests * acts.errors), tuple(latency), (), "fake")

    def drift(
        self, model: str, stable: str, candidate: str, columns: Sequence[str], method: str, since: float
    ) -> Drift:
        self._up()
        rows = [int(max(self.requests.get((model, v, s), 0.0) for s in (True, False))) for v in (stable, candidate)]
        if min(rows) == 0:
            raise NotThere("no sampled rows yet")
        apart = abs(self.behaviour.get(candidate, Behaviour()).shift - self.behaviour.get(stable, Behaviour()).shift)
        p_value = 0.0005 if apart > 0.05 else 0.6
        seen = tuple(ColumnDrift(name, method, apart, p_value, high=apart + 0.03, error=0.01) for name in columns)
        return Drift(rows[0], rows[1], seen, p_value, newest=self._served)

    def pairs(self, model: str, stable: str, candidate: str, tolerance: float, since: float) -> Pairs:
        self._up()
        compared = int(max(self.requests.get((model, v, True), 0.0) for v in (stable, candidate)))
        return Pairs(compared, 0)

    def outcomes(self, model: str, stable: str, candidate: str, metric: str, since: float, wait: float) -> Outcomes:
        """Requests are pairs where one of the two got copies. The better version is wrong only where the other is."""
        self._up()
        counted = {}
        for version in (stable, candidate):
            live, copied = (self.requests.get((model, version, shadow), 0.0) for shadow in (False, True))
            counted[version] = (int(live), int(copied))
        both = max(counted[stable][1], counted[candidate][1])
        n = int(both * self.labelled)
        apart = self.behaviour.get(candidate, Behaviour()).wrong - self.behaviour.get(stable, Behaviour()).wrong
        other = round(n * apart)
        alone = {v: int(max(counted[v][0] - both, 0) * self.labelled) for v in (stable, candidate)}
        wrong = {v: round(alone[v] * self.behaviour.get(v, Behaviour()).wrong) for v in (stable, candidate)}
        waiting = int(sum(counted[candidate]) * (1.0 - self.labelled))
        single = {v: Sums(alone[v], wrong[v], wrong[v]) for v in (stable, candidate)}
        return Outcomes(since, Sums(n, other, abs(other)), single[candidate], single[stable], waiting)

    def _up(self) -> None:
        if self.down:
            raise PortError("the telemetry is down (by the test)")
