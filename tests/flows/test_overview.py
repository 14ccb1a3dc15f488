"""How things stand, as `lockgate status` shows it."""

from __future__ import annotations

from typing import Any

import pytest

from flows import overview
from flows.orders import order
from flows.settings import Settings
from flows.wiring import Addresses
from tasks.ports import Entry
from tests.stories.world import MODEL, World, of_tomorrow


def seen(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The models."""
    monkeypatch.setattr(overview, "located", lambda _: Addresses("home", 1, 2, 3, 4))
    monkeypatch.setattr(overview, "connect", lambda _: world.ports)
    return {model["model"]: model for model in overview.overview(Settings())["models"]}


def test_of_each_model_the_newest_rollout_is_read_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    asked = world.ledger.read(world.request("r1"))[0]
    for name, model in (("r2", "other"), ("r3", MODEL), ("r4", "other"), ("r5", "third"), ("r6", MODEL)):
        body = {**asked.body, "model": model, "flow_run": f"run of {name}"}
        world.ledger.append(name, 1, asked.at, "test", asked.kind, body)
    read: list[str] = []
    original = world.ledger.read

    def counted(rollout: str, after: int = 0) -> list[Entry]:
        read.append(rollout)
        return original(rollout, after)

    monkeypatch.setattr(world.ledger, "read", counted)
    models = seen(world, monkeypatch)
    assert {name: model["rollout"] for name, model in models.items()} == {MODEL: "r6", "other": "r4", "third": "r5"}
    assert models["other"]["links"]["Prefect"].endswith("/run of r4")
    assert set(read) == {"r4", "r5", "r6"}


def test_a_rollout_that_cannot_be_read_is_said_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.drive()
    of_tomorrow(world, "r2", "other")
    models = seen(world, monkeypatch)
    assert models[MODEL]["state"] == "promoted"
    assert models["other"]["state"] is None
    assert models["other"]["reason"].startswith("rollout r2 cannot be read")


def test_a_paused_rollout_is_called_paused_beside_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    told: list[str] = []

    def pause() -> None:
        model = seen(world, monkeypatch)[MODEL]
        if not told and model["state"] == "canary 20 %":
            order(world.ports, "r1", "ann/1", "pause", "the desk calls", "ann")
            told.append(seen(world, monkeypatch)[MODEL]["state"])
            order(world.ports, "r1", "ann/1", "abort", "enough", "ann")

    name = world.request()
    world.clock.alarms.append(pause)
    world.controller(name).drive()
    assert told == ["canary 20 % (paused)"]
