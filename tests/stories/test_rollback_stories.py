"""The way back by hand, told as stories: asked for once, twice, and while something else is under way."""

from __future__ import annotations

from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flows.deliver import outcome_of
from flows.delivery import Delivery, requested
from flows.orders import order
from flows.rollback import is_gone, proven_before, take_back
from flows.rollout import Controller
from flows.run import run_delivery, run_rollback
from flows.settings import Settings
from flows.story import fold, story_of
from flows.turn import _wait_turn, _Waiting
from policies.events import Phase
from policies.policy import Policy, PolicyError
from policies.policy_yaml import parse
from policies.rollout import Rollout, terms
from policies.verdict import GateReport, Verdict
from tasks.ports import BadInput, Deployment, ModelVersion, NotThere, PortError, Signature
from tests.stories.world import MODEL, POLICY, Died, World, directly, of_tomorrow


def promoted(*versions: str) -> World:
    """Each was delivered and promoted after the one before it; the first by itself."""
    world = World(first=True)
    world.stable = None
    for version in versions:
        deliver(world, version)
    return world


def deliver(world: World, version: str) -> None:
    route = world.router.current(MODEL)
    world.stable = route.stable if route else None
    world.target.store.add(f"digest-{version}")
    name = f"r{len(world.ledger.rollouts())}"
    assert world.controller(world.request(name, version)).drive().phase is Phase.PROMOTED


def goes_back(world: World, run: Any = directly) -> tuple[str, Rollout]:
    return take_back(world.ports, MODEL, "complaints", "ben", world.seen.append, run)


def serving(world: World) -> str | None:
    route = world.router.current(MODEL)
    return route.stable if route else None


def gone(world: World, name: str, state: Rollout) -> bool:
    """What makes the command's exit code 0."""
    return is_gone(world.ledger, asdict(outcome_of(story_of(world.ledger.read(name)), state, 1.0)))


def stands_still_after(world: World, effect: str) -> str:
    """A way back whose process stopped when the effect was done; its rollout's name."""

    def run(task: Any, *args: Any, name: str = "") -> Any:
        done = task.fn(*args)
        if name.startswith(effect):
            raise Died
        return done

    with pytest.raises(Died):
        goes_back(world, run)
    return world.ledger.rollouts(MODEL)[0]


@pytest.mark.parametrize("effect", ["deploy", "route"])
def test_who_asks_for_a_rollback_that_is_under_way_follows_it_to_its_end(effect: str) -> None:
    world = promoted("1", "2")
    first = stands_still_after(world, effect)

    def goes_on() -> None:
        world.clock.alarms.clear()
        Controller(world.ports, first, "the first", directly, proven_before, world.seen.append).drive()

    world.clock.alarms.append(goes_on)
    name, state = goes_back(world)
    assert (name, state.phase, serving(world)) == (first, Phase.PROMOTED, "1")
    assert state.reason.startswith(f"rollback {first} was under way already")
    assert gone(world, name, state)


def test_a_rollback_whose_process_died_is_driven_by_whoever_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = promoted("1", "2")
    first = stands_still_after(world, "deploy")
    monkeypatch.setattr("flows.rollback.is_dead", lambda _who: True)
    name, state = goes_back(world)
    assert (name, state.phase, serving(world)) == (first, Phase.PROMOTED, "1")
    assert world.ledger.claim(MODEL, "local", "next") == "next"


def test_each_rollback_goes_further_back_and_none_forward_to_what_was_taken_back() -> None:
    world = promoted("1", "2", "3")
    for former in ("2", "1"):
        name, state = goes_back(world)
        assert serving(world) == former
        assert gone(world, name, state)
    with pytest.raises(NotThere, match=r"it serves v1\. What was taken back can be delivered anew"):
        goes_back(world)
    assert serving(world) == "1"


def rewritten(world: World, rollout: str, policy: Any) -> None:
    """The rollout was requested under another policy."""
    first = world.ledger._books[rollout][0]
    world.ledger._books[rollout][0] = replace(first, body={**first.body, "policy": policy})


def test_a_way_back_to_a_version_of_a_policy_that_would_be_refused_today() -> None:
    """No rule that is new keeps what the ledger has from being read."""
    text = (
        "policy: old\nrollout:\n  timeout: 1s\n  stages: [shadow: {share: 0.004, for: 5s}]\n"
        "  watch: {shadow: 0.004}\n  gates: {latency: {slo_ms: 2000}, drift: {method: ks, rows_min: 9000}}\n"
        "monitor: {drift: {rows_min: 9000}}\n"
    )
    with pytest.raises(PolicyError):
        parse(text)
    old = yaml.safe_load(text)
    assert terms(Policy.model_validate(old)).stops[0].shadow == 1
    world = promoted("1", "2")
    rewritten(world, "r0", old)
    assert goes_back(world)[1].phase is Phase.PROMOTED
    assert serving(world) == "1"


def test_a_policy_that_cannot_be_read_at_all_leaves_no_claim_behind() -> None:
    world = promoted("1", "2")
    rewritten(world, "r0", {"policy": "of-tomorrow", "unheard": "of"})
    with pytest.raises(PortError, match="the policy of rollout r0 cannot be read: rollout: Field required; unheard"):
        goes_back(world)
    assert serving(world) == "2"
    assert world.ledger.claim(MODEL, "local", "next") == "next"


def test_a_rollout_that_another_version_of_lockgate_wrote_stops_no_way_back() -> None:
    world = promoted("1", "2")
    of_tomorrow(world, "r8", MODEL)
    world.clock.sleep(60.0)
    assert goes_back(world)[1].phase is Phase.PROMOTED
    assert serving(world) == "1"


def test_what_was_taken_back_and_delivered_anew_is_gone_back_to_again() -> None:
    world = promoted("1", "2")
    goes_back(world)
    deliver(world, "2")
    deliver(world, "3")
    goes_back(world)
    assert serving(world) == "2"


@pytest.mark.parametrize("seconds", [0.0, 12.0])
def test_a_delivery_under_way_is_taken_back_and_that_is_what_was_asked_for(seconds: float) -> None:
    """Before anything of it was live, or after."""
    world = World()
    name = world.request()
    if seconds:
        world.drive_until_death(world.clock.monotonic + seconds, name)

    def goes_on() -> None:
        world.clock.alarms.clear()
        world.controller(name).drive()

    world.clock.alarms.append(goes_on)
    found, state = goes_back(world)
    assert (found, state.phase) == (name, Phase.ROLLED_BACK if seconds else Phase.REFUSED)
    assert serving(world) == "1"
    assert gone(world, name, state)


def test_a_delivery_that_was_faster_than_the_order_is_taken_back_all_the_same() -> None:
    world = promoted("1", "2")
    world.stable = "2"
    world.target.store.add("digest-3")
    controller = world.controller(world.request("r9", "3"))
    read, under_way = world.ledger.rollouts, []

    def it_ends_meanwhile(model: str | None = None, active: bool = False) -> list[str]:
        found = read(model, active)
        if active and not under_way:
            under_way.extend(found)
            assert controller.drive().phase is Phase.PROMOTED
        return found

    world.ledger.rollouts = it_ends_meanwhile  # type: ignore[method-assign]
    name, state = goes_back(world)
    assert under_way == ["r9"]
    assert (name.startswith(f"{MODEL}-back-"), state.phase, serving(world)) == (True, Phase.PROMOTED, "2")
    assert gone(world, name, state)


@pytest.mark.parametrize("away_s", [3.0, 30.0])
def test_a_rollback_whose_process_dies_when_the_traffic_is_set_is_gone_on_with_however_late(away_s: float) -> None:
    """A lease would give the traffic back to the version that is to go."""
    world = promoted("1", "2")
    first = stands_still_after(world, "route")
    world.clock.sleep(away_s)
    state = Controller(world.ports, first, "the next", directly, proven_before, world.seen.append).drive()
    assert (state.phase, serving(world)) == (Phase.PROMOTED, "1")


def test_a_delivery_supersedes_no_rollback() -> None:
    world = promoted("1", "2")
    first = stands_still_after(world, "deploy")
    policy = parse(POLICY + "  on_conflict: supersede\n")
    v3, waiting = ModelVersion(MODEL, "3", "digest-3", Signature((), ()), "run"), _Waiting()
    request = Delivery(model=MODEL, source="x.onnx", policy="")
    assert _wait_turn(world.ports, policy, v3, request, "r3", waiting) is None
    assert (waiting.ahead, waiting.told) == (first, set())
    state = Controller(world.ports, first, "the first", directly, proven_before, world.seen.append).drive()
    assert (state.phase, serving(world)) == (Phase.PROMOTED, "1")


def test_a_rollback_that_was_itself_aborted_or_a_delivery_that_was_too_late_is_not_done() -> None:
    world = promoted("1", "2")
    first = stands_still_after(world, "deploy")
    world.ledger.append(
        first, world.ledger.last(first, 1)[0].sequence + 1, world.clock.now(), "ann", "ordered",
        {"order": "abort", "reason": "it was a mistake", "by": "ann"},
    )  # fmt: skip
    Controller(world.ports, first, "the first", directly, proven_before, world.seen.append).drive()
    for name in (first, "r1"):
        state = fold(world.ledger.read(name))
        assert state is not None
        assert not gone(world, name, state)


@pytest.mark.parametrize(("outcome", "code"), [("promoted", 0), ("rolled_back", 1), ("refused", 1), ("halted", 3)])
def test_the_command_s_exit_code_says_whether_the_bad_version_is_gone(
    monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    """Of a rollback. Of a delivery that was to go back the codes are the other way round."""
    world = promoted("1", "2")
    name, state = goes_back(world)
    monkeypatch.setattr("flows.run.configure", lambda _settings: None)
    monkeypatch.setattr("flows.run.prefect_answers", lambda *_: False)
    monkeypatch.setattr("flows.run.ledger", lambda _settings: world.ledger)
    ended = asdict(outcome_of(story_of(world.ledger.read(name)), state, 1.0))
    delivered = {**ended, "rollout": "r1"}
    monkeypatch.setattr("flows.rollback.rollback_without_prefect", lambda *_: {**ended, "outcome": outcome})
    assert run_rollback(Settings(), MODEL, "", None, Console(quiet=True))[0] == code
    monkeypatch.setattr("flows.rollback.rollback_without_prefect", lambda *_: {**delivered, "outcome": outcome})
    assert run_rollback(Settings(), MODEL, "", None, Console(quiet=True))[0] == {0: 1, 1: 0, 3: 3}[code]


BAD = "caf\udce9 \0"


def test_no_way_back_is_refused_for_a_character_wherever_it_comes_from() -> None:
    """Invariant 9. From the terminal, an environment, a policy of an older ledger, and a port's error."""
    world = promoted("1", "2")
    request = world.ledger.read("r0")[0]
    request.body["policy"]["monitor"]["data"] = BAD  # type: ignore[index]
    deploy, tries = world.target.deploy, [PortError(BAD)]

    def fails_first(wanted: Deployment, trial: bool = False) -> object:
        if tries:
            raise tries.pop()
        return deploy(wanted, trial)

    world.target.deploy = fails_first  # type: ignore[method-assign, assignment]
    name, state = take_back(world.ports, MODEL, BAD, BAD, world.seen.append, directly)
    assert (state.phase, serving(world)) == (Phase.PROMOTED, "1")
    book = world.ledger.read(name)
    assert state == fold(book)
    assert [entry.body["error"] for entry in book if entry.kind == "failed"] == ["caf\ufffd \ufffd"]
    assert (book[0].actor, book[0].body["reason"]) == ("caf\ufffd \ufffd", "caf\ufffd \ufffd")


def test_a_refusal_is_settled_whatever_the_check_says() -> None:
    world = World()
    world.checks = [GateReport("data", Verdict.FAIL, BAD)]
    state = world.drive()
    assert (state.phase, state.reason) == (Phase.REFUSED, "data: caf\ufffd \ufffd")
    assert world.ledger.unsettled() == []


def test_an_order_that_holds_such_a_character_is_refused_unless_it_goes_back() -> None:
    world = World()
    name = world.request()
    world.drive_until_death(world.clock.monotonic + 12.0, name)
    before = world.ledger.head()
    with pytest.raises(BadInput, match="write it in UTF-8"):
        order(world.ports, name, "ann/1", "pause", BAD, "ann")
    assert world.ledger.head() == before
    order(world.ports, name, "ann/1", "abort", BAD, "ann")
    assert world.controller(name).drive().phase is Phase.ROLLED_BACK


def test_a_delivery_to_a_target_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The claim is on model and target: two targets over one route would be two rollouts of the model at once."""
    with pytest.raises(BadInput, match="there is no target 'gpu'; the one that there is is 'local'"):
        requested(tmp_path, MODEL, 1, None, None, None, target="gpu")


def test_a_delivery_that_could_not_be_written_down_is_refused_before_anything_has_come_of_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="write it in UTF-8"):
        requested(tmp_path, MODEL, 1, None, None, None, reason=BAD)
    request = {"model": MODEL, "version": None, "source": "caf\udce9.onnx", "policy": "p", "files": {}, "reason": ""}
    err = Console(file=StringIO())
    assert run_delivery(Settings(), request, None, err)[0] == 2
    assert "cannot be kept" in err.file.getvalue()  # type: ignore[attr-defined]
