"""The life of a rollout, told from outside: what is asked, what the traffic does, what is on the record."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.checks import Preparation, run_checks
from flows.delivery import Delivery
from flows.story import fold
from flows.turn import BEGIN_S, _wait_turn, _Waiting, refuse_unsigned, start
from policies.events import Phase
from policies.evidence import Counts
from policies.policy_yaml import parse
from policies.traffic import Route
from policies.verdict import GateReport, Verdict
from tasks.ports import ModelVersion, PortError, Refused, Signature, Submission
from tasks.validation import check_answers
from tests.fakes.clock import FakeClock
from tests.fakes.inspector import MODEL as MODEL_FILE
from tests.fakes.inspector import FakeInspector
from tests.fakes.registry import FakeRegistry
from tests.stories.world import MODEL, POLICY, World, directly

KEY = "a2V5"
PEM = f"-----BEGIN PUBLIC KEY-----\\n{KEY}\\n-----END PUBLIC KEY-----"


def test_a_good_version_climbs_every_stage_and_ends_alone_with_the_alias() -> None:
    world = World()
    state = world.drive()
    assert state.phase is Phase.PROMOTED
    assert world.weights == [
        ("1", None, 0, 0),
        ("1", "2", 0, 100),
        ("1", "2", 20, 0),
        ("1", "2", 50, 0),
        ("1", "2", 100, 25),
        ("2", None, 0, 0),
    ]
    assert world.registry.aliases == {"champion": "2", "previous": "1"}
    assert world.target.running(MODEL) == {"2": "digest-2"}
    assert world.registry.tags["2"]["lockgate.outcome"] == "promoted"
    assert state.settled


def test_the_policy_s_audience_goes_with_every_share_of_the_candidate() -> None:
    world = World(POLICY + "  audience: {user_cookie: session, never: {tenants: [bank]}}\n")
    assert world.drive().phase is Phase.PROMOTED
    audience = world.policy.rollout.audience
    shared = [route for route in world.router.history if route.candidate]
    assert len(shared) == 4
    assert all((route.key, route.rules) == (audience.key, audience.rules) for route in shared)


def test_a_version_that_fails_more_often_is_taken_back_and_its_bytes_are_quarantined() -> None:
    world = World().given("2", errors=0.10)
    state = world.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert "errors" in state.reason
    assert world.router.current(MODEL).stable == "1"  # type: ignore[union-attr]
    assert world.ledger.quarantined("digest-2") is not None
    assert world.registry.aliases == {"champion": "1"}
    assert "2" not in world.target.running(MODEL)


def test_an_incident_that_hits_both_versions_rolls_nothing_back() -> None:
    state = World().given("1", errors=0.05).given("2", errors=0.05).drive()
    assert state.phase is Phase.PROMOTED


def test_without_any_traffic_nothing_is_promoted() -> None:
    world = World()
    world.telemetry.silent = True
    state = world.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert "not enough evidence" in state.reason
    assert world.ledger.quarantined("digest-2") is None, "nothing was shown against the bytes"


def test_a_first_version_that_passes_its_checks_gets_all_traffic_at_once() -> None:
    world = World(first=True)
    state = world.drive()
    assert state.phase is Phase.PROMOTED
    assert world.weights[-1] == ("2", None, 0, 0)


def test_a_version_that_fails_its_checks_never_gets_a_request() -> None:
    world = World()
    world.checks = [GateReport("quality", Verdict.FAIL, "worse by 5 points")]
    state = world.drive()
    assert state.phase is Phase.REFUSED
    assert "worse by 5 points" in state.reason
    assert world.weights == [("1", None, 0, 0)]


def test_a_check_that_only_holds_has_not_passed() -> None:
    world = World()
    world.checks = [GateReport("quality", Verdict.HOLD, "no rows")]
    assert world.drive().phase is Phase.REFUSED


def test_a_registry_that_is_down_does_not_stand_in_the_way_of_a_rollback() -> None:
    world = World().given("2", errors=0.10)
    world.registry.down = True
    state = world.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert not state.settled, "the tag is still owed"
    assert world.router.current(MODEL).candidate is None  # type: ignore[union-attr]


def test_what_is_still_owed_is_done_by_whoever_drives_next() -> None:
    world = World().given("2", errors=0.10)
    world.registry.down = True
    world.drive()
    world.registry.down = False
    state = world.controller(who="controller-2").drive()
    assert state.settled
    assert world.registry.tags["2"]["lockgate.outcome"] == "rolled_back"


def test_a_source_that_is_down_for_less_than_its_grace_rolls_nothing_back() -> None:
    world = World()
    controller = world.controller(world.request())
    began = world.clock.now()
    world.clock.alarms.append(lambda: setattr(world.telemetry, "down", 12.0 < world.clock.now() - began < 20.0))
    assert controller.drive().phase is Phase.PROMOTED


def test_the_controller_that_was_taken_over_stops_and_writes_nothing() -> None:
    from flows.rollout import Superseded

    world = World()
    first = world.controller(world.request())
    second = world.controller(who="controller-2")
    taken = []

    def take_over() -> None:
        if world.clock.monotonic > 5 and not taken:
            taken.append(True)
            second.drive()

    world.clock.alarms.append(take_over)
    with pytest.raises(Superseded):
        first.drive()
    actors = [entry.actor for entry in world.ledger.entries]
    assert "controller-1" not in actors[actors.index("controller-2") :]


def test_a_lease_that_ran_out_while_nobody_looked_ends_the_rollout_on_stable() -> None:
    world = World()
    controller = world.controller(world.request())
    slept = []

    def stopped_for_a_minute() -> None:
        if world.clock.monotonic > 15 and not slept:
            slept.append(True)
            world.clock.sleep(60.0)

    world.clock.alarms.append(stopped_for_a_minute)
    state = controller.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert "taken back" in state.reason
    assert world.ledger.quarantined("digest-2") is None


@pytest.mark.parametrize(
    ("gate", "source"),
    [
        ("drift: {columns: [prediction], rows_min: 100}", "drift"),
        ("disagreement: {margin: 0.1}", "pairs"),
        ("quality: {margin: 0.2, rows_min: 20}", "outcomes"),
    ],
)
def test_what_a_source_said_before_it_went_down_passes_no_stage(gate: str, source: str) -> None:
    """These are asked less often than it is looked: in between, they are as they were when they were asked last."""
    world = World(POLICY.replace("errors: {margin: 0.02}", "errors: {margin: 0.02}\n    " + gate))
    asked = getattr(world.telemetry, source)
    stage = {"drift": 12.0, "pairs": 4.5, "outcomes": 25.0}[source]  # in the middle of one that asks it
    began = world.clock.now()

    def down(*args: Any) -> Any:
        if world.clock.now() - began > stage:
            raise PortError("down (by the test)")
        return asked(*args)

    setattr(world.telemetry, source, down)
    state = world.drive()
    assert (state.phase, state.unfinished) == (Phase.ROLLED_BACK, True), state.reason
    assert state.reason.endswith("(last verdict: error)")


def test_a_router_that_is_down_at_the_rollback_is_asked_again_until_it_answers() -> None:
    world = World().given("2", errors=0.10)
    controller = world.controller(world.request())
    world.clock.alarms.append(lambda: setattr(world.router, "down", 9 < world.clock.monotonic < 25))
    state = controller.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert world.router.current(MODEL).candidate is None  # type: ignore[union-attr]


def test_the_ledger_out_of_reach_is_an_error_that_loses_nothing() -> None:
    world = World()
    controller = world.controller(world.request())
    world.clock.alarms.append(lambda: setattr(world.ledger, "down", world.clock.monotonic > 12))
    with pytest.raises(PortError):
        controller.drive()
    world.ledger.down = False
    world.clock.alarms.pop()
    assert world.controller(who="controller-2").drive().phase in (Phase.PROMOTED, Phase.ROLLED_BACK)


def test_orders_are_obeyed_within_a_look() -> None:
    from flows.orders import order

    world = World()
    controller = world.controller(world.request())
    given = []

    def abort() -> None:
        if world.clock.monotonic > 12 and not given:
            given.append(True)
            order(world.ports, "r1", "ann", "abort", "the call centre says no")

    world.clock.alarms.append(abort)
    state = controller.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert "the call centre says no" in state.reason
    assert world.ledger.quarantined("digest-2") is None


def test_a_lower_error_budget_needs_no_other_code() -> None:
    world = World(POLICY.replace("rollout:", "rollout:\n  error_budget: 0.01"))
    assert world.drive().phase is Phase.PROMOTED


def test_what_a_look_has_decided_does_not_wait_for_the_next_look() -> None:
    world = World(POLICY.replace("rollout:", "rollout:\n  look_every: 5s")).given("2", errors=0.50)
    assert world.drive().phase is Phase.ROLLED_BACK
    failing = next(e for e in world.ledger.entries if e.kind == "looked" and e.body["verdict"] == "fail")
    back = next(e for e in world.ledger.entries if e.kind == "done" and e.number > failing.number)
    assert back.at - failing.at < 1.0


def test_a_lease_that_ran_out_during_the_promotion_is_a_loss_and_no_riddle() -> None:
    """A controller stood still right after it had the promotion's route in force: nobody need be woken for that."""
    world = World()
    controller = world.controller(world.request())
    apply = world.router.apply

    def stands_still_after(route: Route) -> None:
        apply(route)
        if route.weight == 100:
            world.clock.sleep(60.0)
            raise PortError("no answer")

    world.router.apply = stands_still_after  # type: ignore[method-assign]
    state = controller.drive()
    assert state.phase is Phase.ROLLED_BACK
    assert "taken back" in state.reason


def test_one_reading_that_cannot_be_rolls_nothing_back() -> None:
    world = World()
    controller = world.controller(world.request())
    counts, lies = world.telemetry.counts, iter([math.nan, -5, math.inf])

    def lie_at_first(model: str, version: str, shadow: bool) -> Counts:
        truth = counts(model, version, shadow)
        return truth if world.clock.monotonic < 10 else replace(truth, requests=next(lies, truth.requests))  # type: ignore[arg-type]

    world.telemetry.counts = lie_at_first  # type: ignore[method-assign]
    assert controller.drive().phase is Phase.PROMOTED


def test_bytes_that_came_into_quarantine_meanwhile_fail_the_checks() -> None:
    world = World()
    controller = world.controller(world.request())
    world.ledger.quarantine("digest-2", "it failed under another name", "r0")
    state = controller.drive()
    assert state.phase is Phase.REFUSED
    assert "it failed under another name" in state.reason
    assert world.weights == [("1", None, 0, 0)]


@pytest.mark.parametrize("stopped_after", [("1", "2", 0, 100), ("1", "2", 20, 0), ("1", "2", 50, 0)])
@pytest.mark.parametrize("where", ["before it asks", "while it asks"])
def test_a_controller_that_was_stopped_for_longer_than_the_lease_gives_no_share_again(
    stopped_after: tuple[str | None, str | None, int, int], where: str
) -> None:
    """SIGSTOP after the step is written and before its traffic is changed, then SIGCONT: what the agent did stands."""
    world = World()
    append, apply, stopped = world.ledger.append, world.router.apply, list[Any]()

    def late(route: Route) -> None:
        if not stopped and world.weights[-1] == stopped_after:
            stopped.append(route)
            world.clock.sleep(world.policy.rollout.lease + 1.0)
        apply(route)

    def watched(rollout: str, sequence: int, at: float, actor: str, kind: str, body: Any) -> Any:
        entry = append(rollout, sequence, at, actor, kind, body)
        state = fold(world.ledger.read(rollout))
        assert state is not None
        if not stopped and kind == "looked" and state.pending and world.weights[-1] == stopped_after:
            stopped.append(entry)
            world.clock.sleep(world.policy.rollout.lease + 1.0)
        return entry

    if where == "before it asks":
        world.ledger.append = watched  # type: ignore[method-assign]
    else:
        world.router.apply = late  # type: ignore[method-assign]
    state = world.drive()
    assert stopped
    assert state.phase is Phase.ROLLED_BACK
    after = world.weights[world.weights.index(stopped_after) + 1 :]
    assert {candidate for _, candidate, _, _ in after} == {None}
    assert world.registry.aliases == {"champion": "1"}


def test_who_is_first_in_line_keeps_its_place_while_a_rollback_holds_the_model() -> None:
    """Who waits behind it does not think it dead for time in which it was not its turn."""
    world = World()
    policy, version = world.policy, ModelVersion(MODEL, "3", "digest-3", Signature((), ()), "run")
    waiting, request = _Waiting(), Delivery(model=MODEL, source="x.onnx", policy="")

    def asked() -> str | None:
        return _wait_turn(world.ports, policy, version, request, "behind", waiting)

    world.ledger.claim(MODEL, "local", "before")
    world.ledger.claim(MODEL, "local", "first", in_line=True)
    world.ledger.release(MODEL, "local", "before")
    assert asked() is None
    assert waiting.ahead == "first"
    world.ledger.claim(MODEL, "local", world.request("rollback"))
    world.clock.sleep(BEGIN_S + 10.0)
    assert asked() is None
    assert waiting.ahead == "rollback"
    world.ledger.release(MODEL, "local", "rollback")
    assert asked() is None, "it is the turn of the first"
    assert world.ledger.claim(MODEL, "local", "first", in_line=True) == "first"
    world.ledger.release(MODEL, "local", "first")
    assert asked() == ""


def test_only_what_a_key_of_the_policy_has_signed_is_let_in_and_its_signature_goes_with_it(tmp_path: Path) -> None:
    signed = parse(POLICY + f'governance: {{signed_by: ["{PEM}"]}}\n')
    registry = FakeRegistry(tmp_path / "registry")
    world = World()
    world.policy = signed
    ports = replace(world.ports, registry=registry, inspector=FakeInspector())
    onnx = tmp_path / "m.onnx"
    onnx.write_bytes(MODEL_FILE)
    made = registry.register(Submission(MODEL, str(onnx)))
    with pytest.raises(Refused, match=r"m v1 is not signed, .*set the signature as the version's tag lockgate.signed"):
        refuse_unsigned(ports, signed, made)
    with pytest.raises(Refused, match="m v1: the signature is by none of the keys"):
        refuse_unsigned(ports, signed, replace(made, signed="other" + MODEL_FILE.decode()))
    good = replace(world.registry.version(MODEL, "2"), signed=KEY + MODEL_FILE.decode())
    refuse_unsigned(ports, signed, replace(made, signed=good.signed))
    refuse_unsigned(ports, parse(POLICY), made)
    assert start(world.ports, signed, good, Delivery(model=MODEL, source="x.onnx", policy=""), "r1") is None
    assert world.controller("r1").drive().phase is Phase.PROMOTED
    assert world.ledger.read("r1")[0].body["signed"] == good.signed
    assert world.target.deployed[-1].signed == good.signed
    assert world.target.deployed[-1].signed_by == (KEY,)


def test_the_trial_s_server_verifies_the_signature_that_the_rollout_was_let_in_by(tmp_path: Path) -> None:
    """Whatever the registry's tag says by then."""
    world = World(first=True)
    signed = world.policy = parse(POLICY + f'governance: {{signed_by: ["{PEM}"]}}\n')
    ports = replace(world.ports, registry=FakeRegistry(tmp_path / "registry"))
    onnx = tmp_path / "m.onnx"
    onnx.write_bytes(MODEL_FILE)
    made = ports.registry.register(Submission(MODEL, str(onnx)))
    assert made.signed == ""
    start(ports, signed, replace(made, signed="by the key"), Delivery(model=MODEL, source="x.onnx", policy=""), "r1")
    state = fold(world.ledger.read("r1"))
    assert state is not None

    def run(task: Any, *args: Any, name: str = "") -> Any:
        return [GateReport("quality", Verdict.FAIL, "seen enough")] if task is check_answers else directly(task, *args)

    run_checks(ports, signed, state, Preparation(Submission(MODEL, str(onnx)), None), run)
    assert [each.signed for each in world.target.deployed] == ["by the key"]


@pytest.mark.parametrize("bad", [False, True])
def test_a_registry_that_hangs_costs_no_lease_delays_no_verdict_and_is_not_overtaken(bad: bool) -> None:
    """The alias is set while the candidate is watched at 100 %; the answer takes longer than the lease."""
    world, hung = World(), []

    def beside(work: Callable[[], Any]) -> Future[Any]:
        if hung:
            return FakeClock.beside(world.clock, work)
        made: Future[Any] = Future()
        until = world.clock.monotonic + 30.0

        def answers() -> None:
            if world.clock.monotonic >= until and not made.done():
                made.set_result(work())

        hung.append(world.clock.monotonic)
        world.clock.alarms.append(answers)
        if bad:
            world.given("2", errors=0.5)
        return made

    world.clock.beside = beside  # type: ignore[method-assign, assignment]
    state = world.drive()
    assert state.phase is (Phase.ROLLED_BACK if bad else Phase.PROMOTED)
    assert ("errors" in state.reason) is bad
    looks = [entry for entry in world.ledger.read("r1") if entry.kind == "looked"]
    assert len([entry for entry in looks if entry.at > world.clock.time - world.clock.monotonic + hung[0]]) >= 3
    assert world.registry.aliases["champion"] == ("1" if bad else "2")
