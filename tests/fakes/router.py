"""A fake Router: holds routes with epochs and leases as the node agent does, on the fake clock."""

from __future__ import annotations

from dataclasses import dataclass

from policies.traffic import Route
from tasks.ports import PortError, Refused
from tests.fakes.clock import FakeClock
from tests.fakes.target import FakeTarget


@dataclass
class Held:
    """A route with the time at which its lease ends (monotonic), and whether it ran out."""

    route: Route
    ends: float | None
    lost: bool = False


class FakeRouter:
    """`tasks.ports.Router` in memory. `history` has every route that was ever in force, the agent's own among them."""

    def __init__(self, clock: FakeClock, target: FakeTarget) -> None:
        self.clock, self.target = clock, target
        self.down = False
        self.held: dict[str, Held] = {}
        self.history: list[Route] = []
        clock.alarms.append(self.expire)

    def apply(self, route: Route) -> None:
        self._up()
        held = self.held.get(route.model)
        if held is not None and route.epoch < held.route.epoch:
            raise Refused(f"epoch {route.epoch} is older than {held.route.epoch}")
        if held is not None and route.epoch == held.route.epoch and held.lost:
            raise Refused(f"the lease of epoch {route.epoch} was lost")
        if held is not None and held.lost and route.continues:
            raise Refused(f"the share that epoch {route.epoch} goes on with was lost")
        for version in self._fed(route):
            if (route.model, version) not in self.target.versions:
                raise Refused(f"{route.model} v{version} has no ready replica")
        ends = None if route.lease_s is None else self.clock.monotonic + route.lease_s
        self._hold(route, ends)

    def renew(self, model: str, epoch: int) -> None:
        self._up()
        held = self.held.get(model)
        if held is None or held.route.epoch != epoch or held.lost:
            raise Refused(f"epoch {epoch} is not in force for {model} any more")
        if held.route.lease_s is not None:
            held.ends = self.clock.monotonic + held.route.lease_s

    def current(self, model: str) -> Route | None:
        return self.routes().get(model)

    def routes(self) -> dict[str, Route]:
        self._up()
        return {model: held.route for model, held in self.held.items()}

    def expire(self) -> None:
        """What the agent does by itself: candidates whose lease has run out get no more traffic."""
        for held in list(self.held.values()):
            if held.ends is not None and self.clock.monotonic >= held.ends:
                alone = Route(held.route.model, stable=held.route.stable, epoch=held.route.epoch)
                self._hold(alone, None)
                self.held[alone.model].lost = True

    def _hold(self, route: Route, ends: float | None) -> None:
        self.held[route.model] = Held(route, ends)
        self.history.append(route)
        self.target.busy = {(held.route.model, each) for held in self.held.values() for each in self._fed(held.route)}

    @staticmethod
    def _fed(route: Route) -> list[str]:
        fed = [route.stable] if route.stable and (route.weight < 100 or route.shadow) else []
        return [*fed, *([route.candidate] if route.candidate and (route.weight or route.shadow) else [])]

    def _up(self) -> None:
        if self.down:
            raise PortError("the router is down (by the test)")
