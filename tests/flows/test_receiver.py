"""The receiver over HTTP: what is believed wakes the watcher, what is not is refused and counted."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp.test_utils import TestClient, TestServer

from flows import runs
from flows.receiver import Metrics, Watcher, application
from flows.settings import Settings
from flows.triggers import Seen
from infra.hints_mlflow import Doorkeeper
from tests.infra.test_hints_mlflow import BODY, SECRET, hint


def test_hints_are_answered_counted_and_wake_the_watcher_only_if_they_are_believed() -> None:
    async def play() -> None:
        metrics = Metrics()
        watcher = Watcher(Settings(), metrics)  # not started: the test is about what wakes it
        app = application(Doorkeeper(SECRET, time.time() - 10), watcher, metrics)
        stamp = str(int(time.time()))
        async with TestClient(TestServer(app)) as client:
            for headers, body, status, woken in (
                (hint(stamp=stamp, secret="wrong"), BODY, 401, False),
                ({}, b"", 401, False),
                (hint(stamp="1000"), BODY, 401, False),
                (hint(b"{}", stamp=stamp), b"{}", 400, False),
                (hint(stamp=stamp), BODY, 202, True),
                (hint(stamp=stamp), BODY, 409, False),
                ({}, b"x" * 70_000, 413, False),
            ):
                watcher.woken.clear()
                answer = await client.post("/hints", data=body, headers=headers)
                assert (answer.status, watcher.woken.is_set()) == (status, woken)
            counted = await (await client.get("/metrics")).text()
            for result, count in (("accepted", 1), ("forged", 2), ("stale", 1), ("malformed", 1), ("replayed", 1)):
                assert f'lockgate_hints_total{{result="{result}"}} {count}.0' in counted
            assert (await client.get("/health")).status == 503, "nothing was looked at yet"
            watcher.looked_at = time.time()
            assert (await client.get("/health")).status == 200

    asyncio.run(play())


def test_what_stands_in_the_way_for_a_moment_only_is_looked_at_again_before_the_next_poll(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watcher = Watcher(Settings(registry_poll_s=10.0), Metrics())
    for seen, wait_s in ((Seen(soon=True), 1.0), (Seen(left={"a policy": "is unsound"}), 10.0)):
        monkeypatch.setattr(runs, "look_at_registry", lambda _settings, seen=seen: seen)
        assert watcher._look() == wait_s
