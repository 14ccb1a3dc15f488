"""What is the simulation worth? Realistic mistakes, planted into the flows one at a time: it must find each, soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count, islice
from typing import Any

import pytest

from flows import leftovers, rollout, turn
from policies import rollout as machine
from policies.events import Do, Done, Failed, Looked, Phase, from_body
from policies.verdict import Verdict
from tasks.ports import PortError
from tests.fakes.router import FakeRouter
from tests.fakes.target import FakeTarget
from tests.simulation import world
from tests.simulation.promises import breaches
from tests.simulation.run import play
from tests.simulation.scenario import scenario

SEEDS = 300  # within so many a mistake must be found
Plant = Callable[[pytest.MonkeyPatch], None]
Controller = rollout.Controller


def an_effect_before_its_event(patch: pytest.MonkeyPatch) -> None:
    """The traffic is changed first, and written down afterwards."""
    append = Controller._append

    def act_first(self: Any, event: Any, *more: Any, **extra: Any) -> None:
        if isinstance(event, Looked):
            seen = replace(event, at=self.ports.clock.now(), number=self.ports.ledger.head().number + 1)
            after, effects = machine.step(self.state, seen)
            for effect in effects:
                if effect.do is Do.ROUTE:
                    self.ports.router.apply(rollout.route_for(after, effect, self.policy.rollout))
        append(self, event, *more, **extra)

    patch.setattr(Controller, "_append", act_first)


def an_epoch_that_nobody_checks(patch: pytest.MonkeyPatch) -> None:
    """Whoever holds the route takes any; the one before is forgotten."""
    apply = FakeRouter.apply

    def obey(self: Any, route: Any) -> None:
        held = self.held.pop(route.model, None)
        try:
            apply(self, route)
        except PortError:
            self.held.update({route.model: held} if held is not None else {})
            raise

    patch.setattr(FakeRouter, "apply", obey)


def a_lease_that_nobody_renews(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Controller, "_renew", lambda _self: None)


def a_share_without_a_lease(patch: pytest.MonkeyPatch) -> None:
    made = rollout.route_for
    patch.setattr(rollout, "route_for", lambda *given: replace(made(*given), lease_s=None))


def the_stable_version_is_ended(patch: pytest.MonkeyPatch) -> None:
    """After a way back, instead of the candidate; and the target, which refuses to end what is asked, does not look."""
    deliver_it = Controller._deliver

    def wrong(self: Any, effect: Any) -> None:
        stable = effect.do is Do.UNDEPLOY and self.state.phase is Phase.ROLLED_BACK
        deliver_it(self, replace(effect, version=self.state.stable) if stable else effect)

    def blind(self: Any, model: str, version: str, trial: bool = False) -> None:
        self.versions.pop((model + (".trial" if trial else ""), version), None)

    patch.setattr(Controller, "_deliver", wrong)
    patch.setattr(FakeTarget, "undeploy", blind)


def a_claim_that_is_released_early(patch: pytest.MonkeyPatch) -> None:
    to_the_end = world.to_the_end

    def early(ports: Any, name: str, target: str, drive: Callable[[], Any]) -> Any:
        ports.ledger.release(world.MODEL, target, name)
        return to_the_end(ports, name, target, drive)

    patch.setattr(world, "to_the_end", early)


def a_claim_that_is_never_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leftovers, "_free", lambda *_given: None)


def a_promotion_without_its_gates(patch: pytest.MonkeyPatch) -> None:
    """A stage ends when its time is over, whatever its gates have shown."""
    looked = machine._on_looked

    def lenient(state: Any, event: Any) -> Any:
        return looked(state, replace(event, verdict=Verdict.PASS) if event.verdict is Verdict.HOLD else event)

    for phase in (Phase.SHADOW, Phase.CANARY):
        patch.setitem(machine._TABLE[phase], Looked, lenient)  # type: ignore[arg-type]


def an_outage_that_counts_as_a_failure(patch: pytest.MonkeyPatch) -> None:
    judged = rollout.worst
    patch.setattr(rollout, "worst", lambda all_: Verdict.FAIL if (v := judged(all_)) is Verdict.ERROR else v)


def a_verdict_that_waits_for_the_next_look(patch: pytest.MonkeyPatch) -> None:
    look = Controller._look

    def slow(self: Any) -> None:
        look(self)
        self.ports.clock.sleep(self.policy.rollout.look_every)

    patch.setattr(Controller, "_look", slow)


def bytes_in_quarantine_that_nobody_asks_about(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(turn, "refuse_pointless", lambda *_given: None)
    patch.setattr(world, "refuse_pointless", lambda *_given: None)
    patch.setattr(Controller, "_outdated", lambda _self: ())


def what_could_not_be_delivered_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """One try at everything in the outbox, and it counts as done."""
    deliver_it = Controller._deliver

    def once(self: Any, effect: Any) -> None:
        with suppress(PortError):
            deliver_it(self, effect)

    patch.setattr(Controller, "_deliver", once)


def an_answer_that_was_lost_counts_as_done(patch: pytest.MonkeyPatch) -> None:
    """A change of traffic that timed out is taken for one that happened."""
    try_append = Controller._try_append

    def hopeful(self: Any, event: Any, **extra: Any) -> bool:
        if isinstance(event, Failed) and not event.final:
            event = Done(0.0, 0, event.effect)
        return try_append(self, event, **extra)

    patch.setattr(Controller, "_try_append", hopeful)


def another_controller_goes_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """Whoever was taken over drives on, as if it were still its rollout."""

    def deaf(self: Any) -> None:
        for entry in self.ports.ledger.read(self.rollout, after=self.sequence):
            event = from_body(entry.kind, entry.body, entry.at, entry.number)
            self.state, _ = machine.step(self.state, event)
            self.sequence = entry.sequence
            self._learn(entry)

    patch.setattr(Controller, "_catch_up", deaf)


# The mistake, and the port that must be in trouble, or be away for a while, for it to matter.
PLANTS: tuple[tuple[Plant, str], ...] = (
    (an_effect_before_its_event, ""),
    (an_epoch_that_nobody_checks, "router"),
    (a_lease_that_nobody_renews, ""),
    (a_share_without_a_lease, ""),
    (the_stable_version_is_ended, ""),
    (a_claim_that_is_released_early, ""),
    (a_claim_that_is_never_released, ""),
    (a_promotion_without_its_gates, ""),
    (an_outage_that_counts_as_a_failure, ""),
    (a_verdict_that_waits_for_the_next_look, ""),
    (bytes_in_quarantine_that_nobody_asks_about, ""),
    (what_could_not_be_delivered_is_forgotten, "registry"),
    (an_answer_that_was_lost_counts_as_done, "router away"),
    (another_controller_goes_unnoticed, ""),
)


def seeds(trouble: str) -> Iterator[int]:
    """The first seeds in whose weather the port is in that trouble; all of the first, if none is named."""
    port, _, away = trouble.partition(" ")

    def troubled(seed: int) -> bool:
        weather = scenario(seed).weather
        return (
            not port
            or port in weather.down
            or (not away and port in weather.ports and sum(weather.rates.values()) > 0.02)
        )

    return islice(filter(troubled, count()), SEEDS)


@pytest.mark.parametrize(("plant", "trouble"), PLANTS, ids=[plant.__name__ for plant, _ in PLANTS])
def test_a_planted_mistake_is_found_within_few_seeds(
    plant: Plant, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = next((seed for seed in seeds(trouble) if breaches(play(seed))), None)
    assert found is not None, f"{SEEDS} seeds do not find {plant.__name__}"


def test_nothing_is_found_where_nothing_was_planted() -> None:
    """Else what finds a mistake could be something else."""
    for trouble in {trouble for _, trouble in PLANTS}:
        assert not [seed for seed in islice(seeds(trouble), 20) if breaches(play(seed))]
