"""Nothing twice, nothing lost: whatever the order of looks, failures and settings, each wish comes to one end."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flows.policy import shelf_in
from flows.triggers import Wish, look, policy_for
from policies.triggers import OUTCOME_TAG, Run
from tasks.ports import BadInput, PortError, Registered, Submission
from tests.fakes.inspector import MODEL, FakeInspector
from tests.fakes.ledger import FakeLedger
from tests.fakes.registry import FakeRegistry

POLICY = "policy: {name}\nmodel: {model}\ntrigger: {trigger}\nrollout: {{stages: [canary: {{weight: 10, for: 5s}}]}}\n"


@dataclass
class FakeRuns:
    """Flow runs in memory, one for each key however often it is started. `down` makes every call raise PortError."""

    runs: dict[str, dict[int, Run]] = field(default_factory=dict)
    wishes: dict[str, Wish] = field(default_factory=dict)
    down: bool = False
    hangs: Callable[[], None] | None = None  # a start has taken this, and failed

    def of(self, wishes: Sequence[Wish]) -> Mapping[str, Sequence[Run]]:
        self._up()
        return {wish.key: [run for _, run in sorted(self.runs.get(wish.key, {}).items())] for wish in wishes}

    def start(self, wish: Wish, number: int) -> None:
        self._up()
        self.wishes[wish.key] = wish
        if self.hangs is not None:
            self.hangs()
            raise PortError("timed out (by the test)")
        self.runs.setdefault(wish.key, {}).setdefault(number, Run(None))

    def end(self, key: str, at: float, cancelled: bool = False) -> None:
        self.runs[key][max(self.runs[key])] = Run(at, cancelled)

    def open(self) -> list[str]:
        return [key for key, runs in self.runs.items() if any(run.ended_at is None for run in runs.values())]

    def _up(self) -> None:
        if self.down:
            raise PortError("Prefect is down (by the test)")


@dataclass
class World:
    """A registry with policies beside it, and a clock."""

    folder: Path
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.registry = FakeRegistry(self.folder / "registry", FakeInspector())
        self.ledger = FakeLedger(lambda: self.now)
        self.runs = FakeRuns()
        self.shelf = self.folder / "policies"
        self.shelf.mkdir()

    def policy(self, model: str, trigger: str = "{kind: alias}", name: str | None = None) -> None:
        text = POLICY.format(name=name or model, model=model, trigger=trigger)
        (self.shelf / f"{name or model}.yaml").write_text(text)

    def version(self, model: str, seed: int) -> str:
        onnx = self.folder / f"{model}-{seed}.onnx"
        onnx.write_bytes(MODEL + str(seed).encode())
        return self.registry.register(Submission(model, str(onnx))).version

    def look(self) -> list[str]:
        return look(self.registry, self.ledger, self.runs, self.shelf, lambda: self.now).started


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.policy("m")
    return made


def test_an_alias_starts_one_run_however_often_one_looks(world: World) -> None:
    world.registry.set_alias("m", "candidate", world.version("m", 1))
    assert [len(world.look()) for _ in range(3)] == [1, 0, 0]
    assert world.runs.wishes[world.runs.open()[0]].version == "1"


def test_a_look_does_not_ask_the_registry_once_for_each_model_that_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in "abcd":
        world.policy(model)
        world.registry.set_alias(model, "candidate", world.version(model, 1))
    world.version("d", 2)  # the registry says the newest only
    asked: list[str] = []
    listed = world.registry.listed
    said = world.registry.models()
    monkeypatch.setattr(world.registry, "models", lambda: said)
    monkeypatch.setattr(world.registry, "listed", lambda model: asked.append(model) or listed(model))
    assert len(world.look()) == 4
    assert asked == ["d"]


@pytest.mark.parametrize(("takes_s", "asked"), [(5.0, 1), (0.1, 4)])
def test_a_server_that_hangs_is_not_waited_for_once_for_each_wish(world: World, takes_s: float, asked: int) -> None:
    for model in "abcd":
        world.policy(model)
        world.registry.set_alias(model, "candidate", world.version(model, 1))

    def takes() -> None:
        world.now += takes_s

    world.runs.hangs = takes
    assert world.look() == []
    assert len(world.runs.wishes) == asked
    world.runs.hangs = None
    assert len(world.look()) == 4


def test_a_server_that_is_busy_for_a_moment_is_asked_again_soon(world: World) -> None:
    """At the registry's next poll a version would be found that much later."""
    world.registry.set_alias("m", "candidate", world.version("m", 1))
    world.runs.hangs = lambda: None

    def soon() -> bool:
        return look(world.registry, world.ledger, world.runs, world.shelf, lambda: world.now).soon

    assert soon()
    world.runs.hangs = None
    assert not soon()


def test_a_model_without_a_policy_is_nobody_s_business(world: World) -> None:
    world.registry.set_alias("other", "candidate", world.version("other", 1))
    assert world.look() == []


def test_an_unsound_policy_is_told(world: World) -> None:
    (world.shelf / "broken.yaml").write_text("policy: broken\nmodl: m\n")
    seen = look(world.registry, world.ledger, world.runs, world.shelf, lambda: world.now)
    assert "did you mean 'model'" in seen.left["broken.yaml"]


def test_two_policies_for_one_model_are_told_and_the_other_models_go_on(world: World) -> None:
    world.policy("n")
    world.policy("n", name="n-again")
    for model in ("m", "n"):
        world.registry.set_alias(model, "candidate", world.version(model, 1))
    seen = look(world.registry, world.ledger, world.runs, world.shelf, lambda: world.now)
    assert len(seen.started) == 1
    assert "n-again.yaml" in seen.left["n"]


def test_versions_of_one_model_go_one_after_the_other_oldest_first(world: World) -> None:
    world.policy("m", "{kind: tag, name: go}")
    for seed in (1, 2):
        world.registry.tag("m", world.version("m", seed), {"go": "yes"})
    world.look()
    assert [world.runs.wishes[key].version for key in world.runs.open()] == ["1"]
    world.runs.end(world.runs.open()[0], world.now)
    world.registry.tag("m", "1", {OUTCOME_TAG: "promoted"})
    world.look()
    assert [world.runs.wishes[key].version for key in world.runs.open()] == ["2"]


def test_what_a_person_cancels_is_not_started_again_until_it_is_set_anew(world: World) -> None:
    world.registry.set_alias("m", "candidate", world.version("m", 1))
    world.look()
    world.runs.end(world.runs.open()[0], world.now, cancelled=True)
    for _ in range(3):
        world.now += 100
        assert world.look() == []
    assert world.registry.by_alias("m", "candidate") is None
    world.registry.set_alias("m", "candidate", "1")
    assert len(world.look()) == 1


def test_a_policy_that_the_model_s_tag_names_may_not_be_a_path(world: World) -> None:
    shelf = shelf_in(world.shelf)
    with pytest.raises(BadInput, match="must be the name"):
        policy_for(shelf, Registered("m", {"lockgate.policy": "../../etc/passwd"}, {}))
    named = policy_for(shelf, Registered("other", {"lockgate.policy": "m"}, {}))
    assert named is not None
    assert named.policy.name == "m"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_fails_and_in_whatever_order_one_looks_each_version_comes_to_one_end(world: World, seed: int) -> None:
    """Ten versions, one after the other; runs break, the registry and Prefect are away, looks come at any time."""
    chance = random.Random(seed)
    ended: list[str] = []
    for number in range(1, 11):
        world.registry.set_alias("m", "candidate", world.version("m", number))
        limit = world.now + 20_000
        while world.registry.down or world.registry.by_alias("m", "candidate") is not None:
            assert world.now < limit, "lost"
            world.now += chance.uniform(0.0, 20.0)
            world.registry.down, world.runs.down = chance.random() < 0.2, chance.random() < 0.2
            try:
                world.look()
            except PortError:
                assert world.registry.down or world.runs.down
            world.registry.down = False
            for key in world.runs.open():
                assert len(world.runs.open()) == 1, "twice"
                if chance.random() < 0.5:
                    continue
                world.runs.end(key, world.now)
                if chance.random() < 0.6:  # else it broke, and has settled nothing
                    wish = world.runs.wishes[key]
                    ended.append(wish.version)
                    world.registry.drop_alias("m", "candidate", wish.version)
    assert ended == [str(number) for number in range(1, 11)]
