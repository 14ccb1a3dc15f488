"""Looks at what serves, told as stories: the real flow, a real rollout before it, fakes of all ports, virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import flows.monitor
from flows.monitor import Asked, book, monitor_with
from flows.orders import abort
from flows.record import replay
from flows.rollback import take_back
from tasks.monitor import show
from tasks.ports import Bundle, ContractBreach, ContractResult, Deployment, ModelVersion, NotThere, Refused
from tasks.ports_monitor import MonitorPorts
from tests.fakes.monitor import FakeComparer, FakeHerald, FakeWindows
from tests.stories.world import MODEL, POLICY, Died, World, directly, of_tomorrow

HOUR = 3600.0
ACTING = "monitor: {data: live.yaml, quality: {margin: 0.05}, retrain: {deployment: train/it}, rollback_on: [data]}\n"


class Contract:
    """A data contract whose breaches the test names."""

    breaches: tuple[ContractBreach, ...] = ()

    def check(self, suite: Path, rows: Path) -> ContractResult:
        return ContractResult(100, 3, self.breaches)


class Watched(World):
    """v2 was promoted over v1, and is looked at from now on."""

    def __init__(self, policy: str = POLICY) -> None:
        super().__init__(policy)
        self.recorded: list[Mapping[str, float]] = []
        self.contract = Contract()
        self.registry.fetch = lambda version: Bundle(Path("model.onnx"))  # type: ignore[attr-defined]
        self.registry.record = self._record  # type: ignore[attr-defined]
        object.__setattr__(self.ports, "contract", self.contract)
        self.windows, self.comparer, self.herald = FakeWindows(), FakeComparer(), FakeHerald()
        self.more = MonitorPorts(self.windows, self.comparer, self.herald)
        assert str(self.drive().phase) == "promoted"
        self.clock.sleep(HOUR)

    def _record(self, version: ModelVersion, metrics: Mapping[str, float], files: list[Path]) -> str:
        self.recorded.append(metrics)
        return "link"

    def look(self, wait_s: float = HOUR, **request: Any) -> list[dict[str, Any]]:
        def run(task: Any, *args: Any, name: str = "") -> Any:
            return None if task is show else task.fn(*args)

        found = monitor_with(self.ports, self.more, Asked(**request), run)
        self.clock.sleep(wait_s)
        return found

    def promote(self, version: str) -> None:
        """Over what serves."""
        self.stable = self.serving
        self.target.store.add(f"digest-{version}")
        assert str(self.controller(self.request(f"r{version}", version)).drive().phase) == "promoted"
        self.clock.sleep(HOUR)

    def look_and_die(self) -> None:
        """The process dies once the look is on the ledger, before anything follows from it."""

        def dies(*_: object) -> None:
            raise Died

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(flows.monitor, "_carry_out", dies)
            with pytest.raises(Died):
                self.look()

    @property
    def serving(self) -> str | None:
        route = self.router.current(MODEL)
        return route.stable if route else None

    @property
    def events(self) -> list[str]:
        return [event.removeprefix("lockgate.monitor.") for event, *_ in self.herald.told]


def test_a_version_that_is_as_it_was_is_looked_at_every_period_and_nothing_follows() -> None:
    world = Watched()
    for _ in range(3):
        (look,) = world.look()
        assert (look["verdict"], look["version"], look["standing"]) == ("pass", "2", [])
    assert world.events == ["looked"] * 3
    assert world.herald.started == []
    assert world.registry.tags["2"]["lockgate.monitor.verdict"] == "pass"
    assert world.recorded[-1]["monitor.inputs.age"] == 0.01
    assert all(before[1] == after[0] for before, after in pairwise(world.windows.periods))


def test_a_look_that_is_not_due_is_not_made_unless_somebody_asks() -> None:
    world = Watched()
    assert len(world.look(wait_s=60.0)) == 1
    assert world.look() == []
    assert len(world.look(model=MODEL, at_once=True)) == 1


def test_drift_is_told_in_its_first_period_once_and_ends_when_it_is_over() -> None:
    world = Watched(POLICY + ACTING)
    world.look()
    world.comparer.distance = 0.4
    (look,) = world.look()
    assert (look["verdict"], look["began"]) == ("fail", ["drift"])
    assert "0.4 from the training rows" in look["says"]
    world.look()
    assert world.events == ["looked", "looked", "drift", "looked"]
    assert world.herald.started == ["train/it"]
    assert world.comparer.snapshots[0] == "monitor-newest.html"
    assert world.comparer.snapshots[1] != "monitor-newest.html"
    world.comparer.distance = 0.01
    world.look()
    assert world.events[-1] == "drift.ended"
    assert world.serving == "2"


def test_drift_alone_moves_no_traffic_but_what_the_policy_names_does_and_only_once() -> None:
    world = Watched(POLICY + ACTING)
    world.stable = "2"
    world.target.store.add("digest-3")
    assert str(world.controller(world.request("r2", "3")).drive().phase) == "promoted"
    world.clock.sleep(HOUR)
    breach = (ContractBreach("expect_column_values_to_not_be_null", "age", "9 of 100"),)
    world.contract.breaches = breach
    (look,) = world.look()
    assert (look["version"], look["began"], look["errors"]) == ("3", ["data"], {})
    assert world.serving == "2"
    assert world.herald.started == []  # other bytes do not mend wrong data
    world.contract.breaches = ()
    assert world.look()[0]["version"] == "2"  # brought back by a rollback, and looked at from then on
    world.contract.breaches = breach
    assert world.look()[0]["began"] == ["data"]
    assert world.serving == "2"


@pytest.mark.parametrize("meanwhile", ["another serves", "a rollout is under way"])
def test_nobody_pays_for_what_another_version_did_while_it_was_looked_at(meanwhile: str) -> None:
    world = Watched(POLICY + ACTING)
    world.target.store |= {"digest-3", "digest-4"}
    world.stable = "2"
    assert str(world.controller(world.request("r2", "3")).drive().phase) == "promoted"
    world.clock.sleep(HOUR)
    world.stable = "3"
    world.contract.breaches = (ContractBreach("expect_column_values_to_not_be_null", "age", "9 of 100"),)
    check = world.contract.check

    def then_comes_v4(suite: Path, rows: Path) -> ContractResult:
        name = world.request("r3", "4")
        if meanwhile == "another serves":
            assert str(world.controller(name).drive().phase) == "promoted"
        return check(suite, rows)

    world.contract.check = then_comes_v4  # type: ignore[method-assign]
    (look,) = world.look(wait_s=0.0)
    assert look["began"] == ["data"]
    assert "v3 is not taken back" in look["errors"]["rollback"]
    assert world.serving == ("4" if meanwhile == "another serves" else "3")


def with_wrong_data(policy: str = POLICY + ACTING) -> Watched:
    """v3 was promoted over v2, and its rows are wrong."""
    world = Watched(policy)
    world.stable = "2"
    world.target.store |= {"digest-3", "digest-4"}
    assert str(world.controller(world.request("r2", "3")).drive().phase) == "promoted"
    world.clock.sleep(HOUR)
    world.contract.breaches = (ContractBreach("expect_column_values_to_not_be_null", "age", "9 of 100"),)
    return world


@pytest.mark.parametrize("due", [False, True])
def test_a_way_back_that_could_not_be_finished_is_tried_again_and_nothing_is_told_twice(due: bool) -> None:
    world = with_wrong_data()
    deploy = world.target.deploy

    def does_not_start(wanted: Deployment, trial: bool = False) -> object:
        if wanted.version == "2":
            raise Refused("v2 does not start (by the test)")
        return deploy(wanted, trial)

    world.target.deploy = does_not_start  # type: ignore[method-assign, assignment]
    (look,) = world.look(HOUR if due else 60.0)
    assert "v3 is not taken back: could not start the version" in look["errors"]["rollback"]
    assert [entry.body.get("owed") for entry in world.ledger.last(book(MODEL), 2)] == [None, True]
    world.look(HOUR if due else 60.0)
    assert world.serving == "3"
    world.target.deploy = deploy  # type: ignore[method-assign]
    world.look()
    assert world.serving == "2"
    assert world.events.count("data") == 1


def test_a_way_back_waits_for_the_rollout_under_way_however_long_that_takes_and_goes_when_it_has_ended() -> None:
    world = with_wrong_data(POLICY + ACTING.replace("[data]", "[data, drift]"))
    world.comparer.distance = 0.4
    world.stable = "3"
    world.request("r3", "4")
    for _ in range(4):
        (look,) = world.look()
        assert look["errors"] == {"rollback": "v3 is not taken back yet: rollout r3 is under way"}
    assert len(world.herald.started) == 1, "one alarm, one retraining"
    abort(world.ports, "r3", "ann", "not this one")
    assert str(world.controller("r3").drive().phase) == "refused"
    world.look(wait_s=60.0)
    assert world.serving == "2"


def test_a_column_s_name_that_no_ledger_takes_stops_no_rollback() -> None:
    world = with_wrong_data()
    world.contract.breaches = (ContractBreach("not_null", "caf\udce9", "9 of 100"),)
    (look,) = world.look()
    assert (look["began"], look["errors"], world.serving) == (["data"], {}, "2")


def test_a_way_back_that_waits_is_not_gone_once_the_alarm_is_over() -> None:
    world = with_wrong_data()
    world.stable = "3"
    world.request("r3", "4")
    world.look()
    world.contract.breaches = ()
    world.look(wait_s=60.0)
    abort(world.ports, "r3", "ann", "not this one")
    assert str(world.controller("r3").drive().phase) == "refused"
    assert world.look() == []
    assert world.serving == "3"


def test_what_a_person_went_back_to_is_not_taken_back_for_what_was_seen_before() -> None:
    world = with_wrong_data()
    world.stable = "3"
    world.request("r3", "4")
    assert "rollback" in world.look(wait_s=0.0)[0]["errors"]
    assert str(world.controller("r3").drive().phase) == "promoted"
    take_back(world.ports, MODEL, "v4 is worse", "ann", lambda _: None, directly)
    assert world.serving == "3"
    world.clock.sleep(60.0)
    world.look()
    world.look()
    assert world.serving == "3"


@pytest.mark.parametrize("passes", [1, 2])
def test_a_way_back_that_somebody_stopped_is_not_tried_again(passes: int) -> None:
    world = with_wrong_data()
    deploy = world.target.deploy

    def is_stopped(wanted: Deployment, trial: bool = False) -> object:
        world.target.deploy = deploy  # type: ignore[method-assign]
        if passes == 2:  # another one, which finds the way back under way
            world.look(wait_s=0.0)
        abort(world.ports, world.ledger.rollouts(MODEL)[0], "ann", "v3 is better than nothing")
        return deploy(wanted, trial)

    world.target.deploy = is_stopped  # type: ignore[method-assign, assignment]
    (look,) = world.look()
    assert "v3 is better than nothing" in look["errors"]["rollback"]
    world.look(wait_s=60.0)
    world.look()
    assert world.serving == "3"


def test_what_stood_before_a_version_came_is_no_reason_to_take_it_back() -> None:
    world = Watched(POLICY + ACTING.replace("[data]", "[data, drift]"))
    breach = (ContractBreach("expect_column_values_to_not_be_null", "age", "9 of 100"),)
    world.contract.breaches, world.comparer.distance = breach, 0.4
    (look,) = world.look()
    assert "no former version to go back to" in look["errors"]["rollback"]
    world.promote("3")
    for _ in range(2):
        (look,) = world.look()
        assert (look["version"], look["standing"], look["began"]) == ("3", ["data", "drift"], [])
    assert (world.serving, world.herald.started) == ("3", ["train/it"])
    world.contract.breaches = ()
    world.look()
    assert world.events[-2:] == ["looked", "data.ended"]
    world.contract.breaches = breach
    world.look()
    assert world.serving == "2", "what begins later is another matter"


def test_an_alarm_that_another_version_ended_is_told_to_be_over() -> None:
    world = Watched()
    world.comparer.distance = 0.4
    world.look()
    world.promote("3")
    world.comparer.distance = 0.01
    world.look()
    assert world.events == ["looked", "drift", "looked", "drift.ended"]


def test_an_alarm_that_ended_with_its_version_s_way_back_is_told_to_be_over() -> None:
    world = with_wrong_data()
    world.look()
    world.contract.breaches = ()
    (look,) = world.look()
    assert (look["version"], world.events) == ("2", ["looked", "data", "looked", "data.ended"])


def test_the_next_version_answers_for_itself_where_the_one_before_was_taken_back() -> None:
    world = with_wrong_data()
    world.look(wait_s=60.0)
    assert world.serving == "2"
    world.promote("4")
    (look,) = world.look()
    assert (look["version"], look["began"], look["errors"], world.serving) == ("4", ["data"], {}, "2")


def test_what_a_late_rollback_brought_back_is_what_is_looked_at() -> None:
    world = with_wrong_data()
    world.herald.down = True
    world.stable = "3"
    world.request("r3", "4")
    world.look()
    abort(world.ports, "r3", "ann", "not this one")
    world.controller("r3").drive()
    (look,) = world.look()
    assert (look["version"], world.serving) == ("2", "2")


@pytest.mark.parametrize("what", ["rows", "windows", "comparer", "registry"])
def test_what_cannot_be_looked_at_is_neither_an_alarm_nor_an_all_clear(what: str) -> None:
    world = Watched(POLICY + ACTING)
    if what == "rows":
        world.windows.rows = 0
    else:
        getattr(world, what).down = True
    (look,) = world.look()
    assert look["verdict"] == ("hold" if what == "rows" else "error")
    assert (look["standing"], look["began"]) == ([], [])
    assert world.herald.started == []
    world.windows.rows, world.windows.down, world.comparer.down, world.registry.down = 4000, False, False, False
    assert world.look()[0]["verdict"] == "pass"


@pytest.mark.parametrize("column", ["prediction", "age", "origin"])
def test_columns_that_cannot_be_compared_are_said_and_hide_no_drift_of_others(column: str) -> None:
    world = Watched(POLICY + ACTING)
    world.comparer.broken = column
    (look,) = world.look()
    assert (look["verdict"], look["standing"]) == ("error", [])
    assert f"'{column}' has no value to compare" in look["says"]
    world.comparer.distance = 0.4
    (look,) = world.look()
    assert (look["verdict"], look["began"], world.herald.started) == ("fail", ["drift"], ["train/it"])
    assert replay(world.ledger.read(book(MODEL))) == (2, [])


def test_an_alarm_stands_while_nobody_can_look() -> None:
    world = Watched()
    world.comparer.distance = 0.4
    world.look()
    world.windows.down = True
    assert world.look()[0]["standing"] == ["drift"]


def test_what_could_not_be_told_is_told_by_the_next_look_and_nothing_twice() -> None:
    world = Watched(POLICY + ACTING)
    world.comparer.distance = 0.4
    world.herald.down = True
    (look,) = world.look(wait_s=60.0)
    assert set(look["errors"]) == {"looked", "drift", "retrain"}
    world.herald.down = False
    assert world.look() == []  # not due, but what is owed is paid
    assert sorted(world.events) == ["drift", "looked"]
    assert world.herald.started == ["train/it"]
    world.look()
    assert world.herald.started == ["train/it"]


def test_a_beginning_that_nobody_was_told_of_for_a_whole_period_begins_anew() -> None:
    world = Watched(POLICY + ACTING)
    world.comparer.distance = 0.4
    world.herald.down = True
    world.look()
    world.look()
    world.herald.down = False
    world.look()
    assert world.herald.started
    assert "drift" in world.events


def test_what_a_process_died_before_is_done_by_the_next_look_however_late_if_the_alarm_stands_still() -> None:
    world = with_wrong_data(POLICY + ACTING.replace("[data]", "[data, drift]"))
    world.comparer.distance = 0.4
    world.look_and_die()
    world.clock.sleep(3 * HOUR)
    (look,) = world.look()
    assert (look["version"], look["began"], look["errors"]) == ("3", ["data", "drift"], {})
    assert (world.serving, world.herald.started) == ("2", ["train/it"])
    assert world.events == ["looked", "looked", "data", "drift"]


def test_what_a_process_died_before_is_not_done_once_the_alarm_is_over() -> None:
    world = with_wrong_data()
    world.look_and_die()
    world.contract.breaches = ()
    world.clock.sleep(3 * HOUR)
    (look,) = world.look()
    assert (look["standing"], world.serving, world.events) == ([], "3", ["looked", "looked"])


def test_a_retraining_that_does_not_exist_is_said_and_not_tried_for_ever() -> None:
    world = Watched(POLICY + ACTING)
    world.herald.deployments.clear()
    world.comparer.distance = 0.4
    (look,) = world.look()
    assert look["errors"] == {"retrain": "no deployment 'train/it'"}
    assert world.ledger.last(book(MODEL), 1)[0].body["errors"] == look["errors"]


def test_every_look_can_be_decided_again_from_the_ledger() -> None:
    world = Watched(POLICY + ACTING)
    world.look()
    world.comparer.distance = 0.4
    world.look()
    looks, differences = replay(world.ledger.read(book(MODEL)))
    assert (looks, differences) == (2, [])


def test_a_model_that_nobody_serves_is_not_there_and_others_are_looked_at_all_the_same() -> None:
    world = Watched()
    with pytest.raises(NotThere, match="no version of 'other' serves"):
        world.look(model="other")
    assert len(world.look()) == 1


def test_a_rollout_that_cannot_be_read_keeps_nobody_from_looking() -> None:
    world = Watched()
    of_tomorrow(world, "r8", MODEL)
    assert world.look()[0]["verdict"] == "pass"


def test_without_a_ledger_nothing_is_said() -> None:
    world = Watched()
    world.ledger.down = True
    (look,) = world.look()
    assert look["verdict"] == "error"
    assert world.events == []
