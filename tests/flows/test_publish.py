"""What publishes lives as long as its rollout, whatever the server says."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flows import publish
from flows.publish import Publisher, showing
from flows.rollout import Progress
from tests.stories.world import World

WAIT_S = 20.0


class FakeServer:
    """The part of Prefect's client that a publisher uses; `error` is raised once, by the next call."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.made: list[str] = []
        self.rewritten = 0

    def create_artifact(self, artifact: Any) -> Any:
        self._up()
        self.made.append(artifact.key)
        return type("Made", (), {"id": len(self.made)})

    def update_artifact(self, *_: Any) -> None:
        self._up()
        self.rewritten += 1

    def _up(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    made = FakeServer()

    @contextmanager
    def client(_timeout_s: float) -> Iterator[FakeServer]:
        yield made

    monkeypatch.setattr(publish, "prefect_client", client)
    monkeypatch.setattr(publish, "_EVERY_S", 0.01)
    monkeypatch.setattr(publish, "_LAST_EVERY_S", 0.01)
    return made


def seen() -> list[Progress]:
    world = World()
    world.drive()
    return world.seen


def comes_true(what: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_no_error_ends_the_publisher(server: FakeServer) -> None:
    server.error = RuntimeError("what nobody has thought of (by the test)")
    publisher = Publisher(None, "local")
    publisher(seen()[0])
    publisher.close(WAIT_S)
    assert server.made == ["m-rollout", "m-progress"]


def test_a_relay_that_fails_is_called_again_and_nothing_is_published_again(server: FakeServer) -> None:
    calls: list[int] = []

    def then() -> None:
        calls.append(len(calls))
        if len(calls) < 4:
            raise KeyError("a relay's own fault (by the test)")

    publisher = Publisher(None, "local", then=then)
    publisher(seen()[0])
    comes_true(lambda: len(calls) == 4)
    publisher.close(WAIT_S)
    assert (server.made, server.rewritten, len(calls)) == (["m-rollout", "m-progress"], 0, 4)


def test_what_nobody_was_told_is_said_at_the_end(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    def then() -> None:
        raise KeyError("a relay's own fault (by the test)")

    publisher = Publisher(None, "local", then=then)
    publisher(seen()[0])
    publisher.close(WAIT_S)
    assert "was not told all" in caplog.text
    assert "KeyError" in caplog.text


def test_a_process_ends_in_peace_while_its_publisher_still_works() -> None:
    """Python kills what works at its end, and within pydantic's Rust code that aborts the process: Prefect then says
    that a delivery crashed which had long been promoted."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.flows.ends_while_publishing"], capture_output=True, text=True, check=True
    )
    assert ended.stderr.count("was not told all") == 5, "they did not end before their publishers"
    assert ended.stdout.split() == ["0"] * 5, ended.stderr


def test_what_a_run_shows_goes_on_under_another_controller_and_is_all_said_at_the_end(server: FakeServer) -> None:
    world = World()
    world.drive()
    with showing(world.ledger, lambda _model, _version: {}, "r1") as observe:
        for progress in world.seen:
            observe(progress)
    assert set(server.made) == {"m-rollout", "m-progress", "m-stages"}
    assert not [thread for thread in threading.enumerate() if thread.name == "publish"]
