"""What the next pass finds, and what it makes of it: rollouts without a controller, and what the dead left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest

from flows.approval import answer, asked
from flows.letting_go import let_go
from flows.orders import abort
from flows.reconcile import Cancelled, Drivers, Jobs, Pass, reconcile_with
from flows.rollout import Superseded
from policies.events import Phase
from policies.traffic import Route
from tasks.ports import Deployment, PortError
from tests.stories.world import MODEL, POLICY, Died, World, directly, of_tomorrow


def one_by_one(jobs: Jobs) -> None:
    for job in jobs:
        job()


def a_pass(
    world: World, at_once: bool = False, cancelled: Cancelled = lambda _runs: (), crashed: str | None = None
) -> Pass:
    def checks_of(_entries: Sequence[Any]) -> Any:
        return world.controller().checks

    more: dict[str, Any] = {"cancelled": cancelled, "crashed": crashed}

    def drive(jobs: Mapping[str, Callable[[], None]]) -> None:
        one_by_one([*jobs.values()])

    return reconcile_with(world.ports, "reconciler", directly, checks_of, at_once, drive, one_by_one, **more)


def dies_after(world: World, seconds: float, flow_run: str | None = None) -> None:
    """The rollout `r1` is claimed and driven, until its controller dies."""
    world.ledger.claim(MODEL, "local", "r1")
    world.drive_until_death(seconds, world.request(flow_run=flow_run))


@pytest.fixture(autouse=True)
def _registry_knows_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.stories.world import MemoryRegistry

    def by_alias(self: MemoryRegistry, model: str, alias: str) -> Any:
        named = self.aliases.get(alias)
        return self.version(model, named) if named else None

    monkeypatch.setattr(MemoryRegistry, "by_alias", by_alias, raising=False)


def test_a_rollout_whose_controller_died_within_its_lease_goes_on_to_the_same_end() -> None:
    world = World()
    dies_after(world, 15.0)
    done = a_pass(world, at_once=True)
    assert done.driven == {"r1": "promoted"}
    assert world.router.current(MODEL) == Route(MODEL, stable="2", epoch=world.router.history[-1].epoch)
    assert world.ledger.claim(MODEL, "local", "next") == "next", "the model is free again"


def test_a_rollout_whose_flow_run_was_cancelled_goes_back_though_its_process_was_killed_for_it() -> None:
    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    done = a_pass(world, at_once=True, cancelled=lambda runs: {"run-1"} & {*runs})
    assert done.driven == {"r1": "rolled back"}
    assert world.router.current(MODEL).stable == "1"  # type: ignore[union-attr]
    assert world.ledger.quarantined("digest-2") is None, "nothing was shown against the bytes"


def test_who_cancels_a_run_has_its_rollout_back_without_a_pass_of_the_reconciler() -> None:
    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    assert let_go(world.ports, "run-2", "its flow run was cancelled") == "no rollout of this run is under way"
    assert let_go(world.ports, "run-1", "its flow run was cancelled") == "rollout r1: rolled back"
    assert world.router.current(MODEL).stable == "1"  # type: ignore[union-attr]
    assert world.ledger.claim(MODEL, "local", "next") == "next", "the model is free again"
    assert a_pass(world, at_once=True, cancelled=lambda runs: runs).driven == {}


def test_a_crashed_run_s_rollout_is_left_to_whoever_takes_it_over_and_only_one_does() -> None:
    """The run crashes when Prefect's server is away, too, and that says nothing against the candidate."""
    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    assert "is left to the reconciler: canary 20 %" in let_go(world.ports, "run-1")
    assert a_pass(world, crashed="run-2").driven == {}, "nobody else's"
    world.ledger.append(
        "r1", world.ledger.last("r1", 1)[0].sequence + 1, world.clock.now(), "other", "taken", {"by": "o"}
    )
    assert a_pass(world, crashed="run-1").driven == {}, "somebody drives it"
    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    assert a_pass(world, crashed="run-1").driven == {"r1": "promoted"}


def test_a_run_that_crashes_on_its_way_back_goes_back_at_once() -> None:
    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    abort(world.ports, "r1", "ann", "complaints")
    assert let_go(world.ports, "run-1") == "rollout r1: rolled back"


def test_a_first_version_that_was_taken_back_and_started_late_all_the_same_is_ended() -> None:
    world = World(first=True)
    world.router.apply(Route(MODEL, stable=None, epoch=1))
    world.target.deploy(Deployment(MODEL, "2", "digest-2", world.target.stored("digest-2") or "x"))  # type: ignore[arg-type]
    assert a_pass(world).mended == [f"{MODEL}: undeploy v2"]
    assert world.target.running(MODEL) == {}


def test_who_cancels_a_run_before_anything_is_live_has_the_model_free_again() -> None:
    world = World()
    world.ledger.claim(MODEL, "local", "r1")
    world.request(flow_run="run-1")
    assert let_go(world.ports, "run-1", "its flow run was cancelled") == "rollout r1: refused"
    assert world.ledger.claim(MODEL, "local", "next") == "next"


def test_a_cancelled_rollout_whose_way_back_cannot_be_written_is_not_driven_on() -> None:
    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    append = world.ledger.append

    def away(*_args: Any, **_named: Any) -> Any:
        world.ledger.append = append  # type: ignore[method-assign]
        raise PortError("the ledger does not answer")

    world.ledger.append = away  # type: ignore[method-assign]
    done = a_pass(world, at_once=True, cancelled=lambda runs: runs)
    assert (done.driven, done.left) == ({}, {"r1": "the ledger does not answer"})
    assert a_pass(world, at_once=True, cancelled=lambda runs: runs).driven == {"r1": "rolled back"}


def test_a_rollout_that_waits_for_people_before_anything_is_live_is_driven_once_they_have_answered() -> None:
    canary_first = POLICY.replace("    - shadow: {share: 1.0, for: 8s}\n", "")
    world = World(canary_first + "governance: {approvals: {before: canary, by: [ann], wait: 600s}}\n")
    dies_after(world, 15.0, flow_run="run-1")
    assert a_pass(world, at_once=True, crashed="run-1") == Pass(), "nobody need stand there and wait with them"
    answer(world.ledger, world.clock, asked(world.ledger, MODEL, world.clock.now()), "ann", "approve", "fine")
    assert a_pass(world, at_once=True).driven == {"r1": "promoted"}


def test_a_rollout_that_takes_days_keeps_no_pass_and_no_other_rollout_waiting() -> None:
    free, driven, drivers = threading.Event(), SimpleQueue[str](), Drivers()

    def waits() -> None:
        driven.put("long")
        free.wait(20.0)

    drivers({"long": waits})
    assert driven.get(timeout=20.0) == "long"
    for each in ("first", "second"):  # passes, each of which finds the long one without an entry, too
        drivers({"long": partial(driven.put, "long again"), each: partial(driven.put, each)})
        assert driven.get(timeout=20.0) == each
    free.set()
    drivers.wait()
    drivers({"long": partial(driven.put, "long again")})
    assert driven.get(timeout=20.0) == "long again", "once it is driven no more"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_nobody_has_thought_of_is_raised_where_the_rollouts_are_waited_for() -> None:
    drivers = Drivers()

    def breaks() -> None:
        raise KeyError("by the test")

    drivers({"r1": breaks})
    with pytest.raises(KeyError, match="by the test"):
        drivers.wait()


def test_a_prefect_server_that_is_away_keeps_no_rollout_waiting() -> None:
    def away(_runs: Collection[str]) -> Collection[str]:
        raise PortError("the Prefect server does not answer")

    world = World()
    dies_after(world, 15.0, flow_run="run-1")
    done = a_pass(world, at_once=True, cancelled=away)
    assert done.driven == {"r1": "promoted"}
    assert "does not answer" in done.left["cancelled flow runs"]


def test_a_rollout_on_its_way_back_does_not_wait_for_an_answer_from_prefect() -> None:
    world = World().given("2", errors=0.5)
    world.ledger.claim(MODEL, "local", "r1")
    controller = world.controller(world.request(flow_run="run-1"))

    append = world.ledger.append

    def dies(*args: Any, **named: Any) -> Any:
        entry = append(*args, **named)
        state = world.ledger._state("r1")
        if state is not None and state.phase is Phase.ROLLING_BACK:
            world.ledger.append = append  # type: ignore[method-assign]
            raise Died
        return entry

    world.ledger.append = dies  # type: ignore[method-assign]
    with pytest.raises(Died):
        controller.drive()
    when_asked: list[Phase] = []

    def hangs(_runs: Collection[str]) -> Collection[str]:
        state = world.ledger._state("r1")
        when_asked.extend([state.phase] if state is not None else [])
        return ()

    assert a_pass(world, at_once=True, cancelled=hangs).driven == {"r1": "rolled back"}
    assert when_asked == [Phase.ROLLED_BACK]


def test_a_rollout_whose_controller_died_for_longer_than_its_lease_ends_on_stable() -> None:
    world = World()
    dies_after(world, 15.0)
    world.clock.sleep(60.0)
    assert a_pass(world).driven == {"r1": "rolled back"}
    assert world.router.current(MODEL).stable == "1"  # type: ignore[union-attr]


def test_a_rollout_that_is_being_driven_is_left_alone() -> None:
    world = World()
    passes: list[Pass] = []

    def look() -> None:
        if not passes and world.clock.monotonic > 12:
            passes.append(Pass())
            passes[0] = a_pass(world)

    controller = world.controller(world.request())
    world.ledger.claim(MODEL, "local", "r1")
    world.clock.alarms.append(look)
    assert controller.drive().phase is Phase.PROMOTED
    assert passes[0].driven == {}


def test_a_healthy_rollout_that_is_taken_over_all_the_same_comes_to_no_harm() -> None:
    world = World()
    taken: list[Pass] = []

    def take() -> None:
        if not taken and world.clock.monotonic > 12:
            taken.append(Pass())
            taken[0] = a_pass(world, at_once=True)

    controller = world.controller(world.request())
    world.clock.alarms.append(take)
    with pytest.raises(Superseded):
        controller.drive()
    assert taken[0].driven == {"r1": "promoted"}


def test_a_rollout_without_its_models_claim_goes_back_instead_of_on() -> None:
    world = World()
    world.request("r1")
    world.ledger.claim(MODEL, "local", "r2")
    world.request("r2")
    a_pass(world, at_once=True)
    ended = {name: state.phase for name in ("r1", "r2") if (state := world.ledger._state(name))}
    assert ended == {"r1": Phase.REFUSED, "r2": Phase.PROMOTED}


def test_the_champion_and_the_processes_follow_the_ledger_and_the_route() -> None:
    world = World()
    world.drive()
    world.registry.aliases["champion"] = "1"  # an answer that was on its way for too long
    world.target.deploy(Deployment(MODEL, "1", "digest-1", world.target.stored("digest-1")))  # type: ignore[arg-type]
    world.target.deploy(Deployment(MODEL, "7", "digest-7", world.target.stored("digest-1")), trial=True)  # type: ignore[arg-type]
    done = a_pass(world)
    assert len(done.mended) == 3
    assert world.registry.aliases["champion"] == "2"
    assert set(world.target.versions) == {(MODEL, "2")}
    assert a_pass(world) == Pass(), "the next pass finds nothing to do"


def test_a_claim_that_never_became_a_rollout_is_released() -> None:
    world = World()
    world.ledger.claim(MODEL, "local", "never begun")
    a_pass(world)
    assert world.ledger.claim(MODEL, "local", "next") == "next"


def test_a_registry_that_is_down_leaves_its_part_to_the_next_pass_and_stops_nothing_else() -> None:
    world = World().given("2", errors=0.10)
    dies_after(world, 3.0)
    world.registry.down = True
    a_pass(world, at_once=True)
    assert world.router.current(MODEL).candidate is None  # type: ignore[union-attr]
    assert world.ledger.quarantined("digest-2") is not None
    world.registry.down = False
    a_pass(world, at_once=True)
    assert world.ledger.unsettled() == []


@pytest.mark.parametrize("at_once", [True, False])
def test_a_rollout_that_another_version_of_lockgate_wrote_is_left_and_keeps_no_other_waiting(at_once: bool) -> None:
    world = World().given("2", errors=0.10)
    of_tomorrow(world, "r0", "other")
    dies_after(world, 3.0)
    abort(world.ports, "r1", "ann", "not this one")
    world.clock.sleep(600.0)
    done = a_pass(world, at_once=at_once)
    assert list(done.left) == ["r0"]
    assert done.left["r0"].startswith("rollout r0 cannot be read: ledger entry 2 has the unknown kind 'certified'")
    assert done.driven == {"r1": "rolled back"}
    world.target.deploy(Deployment(MODEL, "7", "digest-7", world.target.stored("digest-1")), trial=True)  # type: ignore[arg-type]
    assert a_pass(world).mended == [f"{MODEL}: end trial of v7"]


def test_what_is_owed_is_settled_although_a_later_rollout_cannot_be_read() -> None:
    world = World().given("2", errors=0.10)
    dies_after(world, 3.0)
    undeploy = world.target.undeploy

    def down(*_: object) -> None:
        raise PortError("the target does not answer")

    world.target.undeploy = down  # type: ignore[method-assign, assignment]
    a_pass(world, at_once=True)
    assert world.ledger.unsettled() == ["r1"]
    of_tomorrow(world, "r2", MODEL)
    world.target.undeploy = undeploy  # type: ignore[method-assign]
    assert list(a_pass(world, at_once=True).left) == ["r2"]
    assert world.ledger.unsettled() == ["r2"]


def test_a_rollout_whose_policy_cannot_be_read_is_left_and_the_pass_goes_on() -> None:
    world = World()
    dies_after(world, 15.0)
    first = world.ledger._books["r1"][0]
    world.ledger._books["r1"][0] = replace(first, body={**first.body, "policy": {"policy": "of-tomorrow"}})
    for at_once in (True, False):
        assert "the policy of rollout r1 cannot be read" in a_pass(world, at_once=at_once).left["r1"]
