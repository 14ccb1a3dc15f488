"""Whatever becomes of a rollout is told to Prefect, each transition once, in the ledger's order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.approval import answer, asked, stands
from flows.form import form, take
from flows.orders import order
from flows.relay import Relay, keep_relaying
from flows.story import fold
from policies.events import Phase
from policies.transitions import NAMES
from tasks.ports import PortError
from tasks.ports_monitor import Notice
from tests.fakes.monitor import FakeForms, FakeHerald
from tests.stories.world import MODEL, POLICY, World, of_tomorrow

ASKS = "governance: {approvals: {by: [ann], wait: 60s}}\n"
PROMOTED = [
    "started", "stage_entered", "stage_entered", "stage_entered", "promoting", "stage_entered", "promoted",
]  # fmt: skip


def told(herald: FakeHerald) -> list[str]:
    return [event.removeprefix("lockgate.rollout.") for event, *_ in herald.told]


def relays_along(world: World, relay: Relay) -> None:
    """The relay looks at each tick of the clock, as long as nothing stands in its way."""

    def pass_on() -> None:
        try:
            relay.pass_on()
        except PortError:
            return

    world.clock.alarms.append(pass_on)


def test_each_transition_is_told_with_stage_share_reason_and_the_run() -> None:
    world, herald = World(), FakeHerald()
    relay = Relay(world.ledger, herald)
    relay.pass_on()  # it is there before the rollout, as on a platform
    world.controller(world.request(flow_run="run-7")).drive()
    relay.pass_on()
    assert told(herald) == PROMOTED
    assert {(rollout, run) for _, rollout, run, _ in herald.about} == {("r1", "run-7")}
    payloads = [payload for *_, payload in herald.about]
    assert [(p["stage"], p["share"], p["copies"]) for p in payloads[1:4]] == [
        ("shadow 100 %", 0, 100), ("canary 20 %", 20, 0), ("canary 50 %", 50, 0),
    ]  # fmt: skip
    assert payloads[4]["says"] == f"m v2: promoting: {payloads[4]['reason']}"
    assert str(payloads[4]["reason"]).startswith("errors 0.00% against 0.00%")
    assert herald.up_to == world.ledger.head().number


@pytest.mark.parametrize("told_before", [True, False])
@pytest.mark.parametrize(("kind", "body"), [("ticked", {}), ("lost", {"says": "gone", "more": "than we know"})])
def test_what_another_version_of_lockgate_wrote_keeps_nothing_else_from_being_told(
    told_before: bool, kind: str, body: dict[str, str]
) -> None:
    world, herald = World(), FakeHerald()
    of_tomorrow(world, "r0", "other")
    if told_before:
        herald.note_told(world.ledger.head().number)
    relay = Relay(world.ledger, herald)
    relay.pass_on()
    world.ledger.append("r0", 3, world.clock.now(), "of tomorrow", kind, body)
    world.drive()
    relay.pass_on()
    assert told(herald)[-len(PROMOTED) :] == PROMOTED
    assert herald.up_to == world.ledger.head().number


def test_prefect_down_loses_nothing_and_stops_nothing() -> None:
    world, herald = World(), FakeHerald()
    relay = Relay(world.ledger, herald)
    relay.pass_on()
    relays_along(world, relay)
    herald.down = True
    world.drive()
    assert told(herald) == []
    herald.down = False
    relay.pass_on()
    assert told(herald) == PROMOTED


@pytest.mark.parametrize("before", range(1, 8))
def test_a_relay_that_dies_is_followed_by_one_that_goes_on(before: int) -> None:
    world, herald = World(), FakeHerald()
    herald.up_to = 0
    first = Relay(world.ledger, herald)
    tell, count = herald.tell, 0

    def dies(*args: object, **named: object) -> None:
        nonlocal count
        count += 1
        tell(*args, **named)  # type: ignore[arg-type]
        if count == before:
            herald.tell = tell  # type: ignore[method-assign]
            raise PortError("the answer was lost (by the test)")

    herald.tell = dies  # type: ignore[method-assign, assignment]
    world.drive()
    with pytest.raises(PortError):
        first.pass_on()
    Relay(world.ledger, herald).pass_on()
    assert told(herald) == PROMOTED


def test_what_one_relay_has_told_no_other_tells_again() -> None:
    """Beside the platform's relay each delivery has its own, which looks when its rollout moves."""
    world, herald = World(), FakeHerald()
    platform, delivery = Relay(world.ledger, herald), Relay(world.ledger, herald)
    delivery.pass_on()
    platform.pass_on()
    relays_along(world, platform)
    controller = world.controller(world.request())
    stages: list[str] = []

    def looks_when_it_moves() -> None:
        if world.seen and world.seen[-1].state.label not in stages:
            stages.append(world.seen[-1].state.label)
            delivery.pass_on()

    world.clock.alarms.append(looks_when_it_moves)
    controller.drive()
    delivery.pass_on()
    platform.pass_on()
    Relay(world.ledger, herald).pass_on()
    assert told(herald) == PROMOTED
    assert len(herald.posts) == len(PROMOTED)
    assert len(stages) > 3


def test_a_relay_that_is_behind_does_not_note_less_than_was_told() -> None:
    world, herald = World(), FakeHerald()
    herald.up_to = 0
    behind, tell = Relay(world.ledger, herald), herald.tell
    world.drive()

    def another_is_faster(notice: Notice) -> None:
        tell(notice)
        herald.tell = tell  # type: ignore[method-assign]
        world.drive("r2")
        Relay(world.ledger, herald).pass_on()

    herald.tell = another_is_faster  # type: ignore[method-assign]
    behind.pass_on()
    assert herald.up_to == world.ledger.head().number


def test_what_was_told_is_noted_later_where_that_failed() -> None:
    world, herald = World(), FakeHerald()
    herald.up_to = 0
    relay, note = Relay(world.ledger, herald), herald.note_told

    def fails(_number: int) -> None:
        herald.note_told = note  # type: ignore[method-assign]
        raise PortError("the orchestrator does not answer (by the test)")

    herald.note_told = fails  # type: ignore[method-assign]
    world.drive()
    with pytest.raises(PortError):
        relay.pass_on()
    relay.pass_on()
    assert herald.up_to == world.ledger.head().number


@pytest.mark.parametrize("noted", [None, 0])
def test_a_relay_that_begins_while_prefect_is_down_tells_all_that_it_has_missed(noted: int | None) -> None:
    world, herald = World(), FakeHerald()
    herald.up_to, herald.down = noted, True
    relay = Relay(world.ledger, herald)
    with pytest.raises(PortError):
        relay.pass_on()
    world.drive()
    with pytest.raises(PortError):
        relay.pass_on()
    herald.down = False
    relay.pass_on()
    assert told(herald) == PROMOTED
    assert herald.up_to == world.ledger.head().number


def test_no_error_ends_the_relay(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a thread that nobody restarts."""
    world, herald = World(), FakeHerald()
    herald.up_to = 0
    world.drive()
    faults: list[Exception] = [KeyError("what nobody has thought of (by the test)"), PortError("down (by the test)")]
    tell = herald.tell

    def fails(notice: Notice) -> None:
        if faults:
            raise faults.pop(0)
        tell(notice)

    def ends(_seconds: float) -> None:
        if told(herald) == PROMOTED:
            raise SystemExit

    herald.tell = fails  # type: ignore[method-assign]
    monkeypatch.setattr("flows.relay.time.sleep", ends)
    with pytest.raises(SystemExit):
        keep_relaying(lambda: Relay(world.ledger, herald))
    assert "events are told later: KeyError: " in capfd.readouterr().out


def test_history_is_no_news_but_a_rollout_under_way_is() -> None:
    world, herald = World(), FakeHerald()
    world.drive("old")
    world.request("new")
    Relay(world.ledger, herald).pass_on()
    assert [(event, rollout) for event, rollout, *_ in herald.about] == [("lockgate.rollout.started", "new")]


def paused(world: World) -> None:
    order(world.ports, "r1", "ann", "pause", "a look at it", "ann")
    order(world.ports, "r1", "ann", "resume", "fine", "ann")


def approved(world: World) -> None:
    answer(world.ledger, world.clock, asked(world.ledger, MODEL, world.clock.now()), "ann", "approve", "fine")


@pytest.mark.parametrize(
    ("policy", "when", "act", "expected"),
    [
        (POLICY, "canary 20 %", paused, ["paused", "resumed"]),
        (
            POLICY + ASKS,
            "canary 50 %, waiting for approval",
            approved,
            ["approval_asked", "approval_given"],
        ),
    ],
)
def test_what_people_do_is_told(policy: str, when: str, act: Callable[[World], None], expected: list[str]) -> None:
    world, herald = World(policy), FakeHerald()
    controller = world.controller(world.request())
    done: list[bool] = []

    def alarm() -> None:
        if not done and world.seen and world.seen[-1].state.label == when:
            done.append(True)
            act(world)

    world.clock.alarms.append(alarm)
    controller.drive()
    Relay(world.ledger, herald).pass_on()  # it was settled before anybody passed it on: history
    assert told(herald) == []
    herald.up_to = 0
    Relay(world.ledger, herald).pass_on()
    assert [name for name in told(herald) if name not in PROMOTED] == expected
    assert set(told(herald)) <= set(NAMES)


def test_a_rollback_is_told_with_what_the_gate_said() -> None:
    world, herald = World().given("2", errors=0.5), FakeHerald()
    herald.up_to = 0
    world.drive()
    Relay(world.ledger, herald).pass_on()
    assert told(herald)[-2:] == ["rolling_back", "rolled_back"]
    assert "errors" in str(herald.about[-2][3]["reason"])
    assert "errors" in str(herald.about[-1][3]["says"])


def test_who_is_asked_finds_one_form_and_an_answer_from_elsewhere_closes_it() -> None:
    world, herald, forms = World(POLICY + ASKS), FakeHerald(), FakeForms()
    relay = Relay(world.ledger, herald, forms)
    relay.pass_on()
    relays_along(world, relay)
    controller = world.controller(world.request())
    at_answer: list[list[str]] = []

    def alarm() -> None:
        state = fold(world.ledger.read("r1"))
        if not at_answer and state is not None and state.question is not None and forms.open:
            at_answer.append(list(forms.open))
            approved(world)

    world.clock.alarms.append(alarm)
    controller.drive()
    relay.pass_on()
    assert len(at_answer[0]) == 1
    assert forms.opened == ["m v2: approve the promotion?"]
    assert forms.open == []


def test_the_form_s_answer_is_that_of_the_command_and_counts_once() -> None:
    world = World(POLICY + "governance: {approvals: {by: [ann, ben], count: 2, wait: 60s}}\n")
    controller = world.controller(world.request())
    said: list[str] = []

    def alarm() -> None:
        state = fold(world.ledger.read("r1"))
        if said or state is None or state.question is None:
            return
        question = stands(world.ledger, "r1", state.question.number, world.clock.now())
        assert question is not None
        assert stands(world.ledger, "r1", state.question.number + 1, world.clock.now()) is None
        fields = form(question, "no such name")
        schema = fields.model_json_schema()["properties"]
        assert schema["by"]["enum"] == ["ann", "ben"]
        assert all(field.get("description") for field in schema.values())
        assert "May m v2 go on to promotion?" in fields._description
        assert "no such name" in fields._description

        def answers(by: str, key: str, answer: str = "approve") -> str:
            made = fields(answer=answer, by=by, reason="seen", ticket="CHG-42")
            return take(world.ledger, world.clock, question, made, key)

        said.extend([answers("eve", "f/1"), answers("ann", "f/2"), answers("ann", "f/2"), answers("ben", "f/3")])

    world.clock.alarms.append(alarm)
    assert controller.drive().phase is Phase.PROMOTED
    assert "does not name 'eve'" in said[0]
    assert said[1:] == ["", "", ""]
    written = [entry for entry in world.ledger.entries if entry.kind == "answered"]
    assert [(entry.body["by"], entry.body["ticket"], entry.actor) for entry in written] == [
        ("ann", "CHG-42", "ann (Prefect form)"),
        ("ben", "CHG-42", "ben (Prefect form)"),
    ]
