"""Evidently's pages: one for each stage that is over, beside the rollout, and never in its way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.explain import explained, lines
from flows.pages import Pages
from flows.story import story_of
from infra.report_html import render
from policies.events import Phase
from policies.rollout import Rollout
from tasks.ports import ModelVersion, NotThere, PortError, Refused
from tests.stories.world import MemoryRegistry, World


class FakePages:
    """`tasks.ports.DriftPages`: writes a page, after `before` has been called."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.asked: list[tuple[str, str, float, float]] = []

    def write(self, model: str, stable: str, candidate: str, since: float, until: float, path: Path) -> Path:
        self.before()
        self.asked.append((stable, candidate, since, until))
        path.write_text(f"<html>{model}</html>")
        return path


class KeepingRegistry(MemoryRegistry):
    """Keeps files with a version's run."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def record(self, version: ModelVersion, _metrics: object, files: list[Path]) -> str:
        self._up()
        assert files[-1].read_text()
        self.kept.append(files[-1].name)
        return f"http://registry/{version.version}/{files[-1].name}"


def told(maker: FakePages, refused: Sequence[Exception] = (), **candidate: float) -> tuple[World, Rollout, Pages]:
    """A rollout at its end, whose pages may still be made. The ledger answers their first notes with `refused`."""
    world = World().given("2", **candidate)
    answers = iter(refused)

    def answer(call: str) -> None:
        if call == "append" and threading.current_thread().name == "pages":
            for error in answers:
                raise error

    world.ledger.before = answer
    world.registry = KeepingRegistry()
    world.registry.aliases["champion"] = "1"
    world.ports = replace(world.ports, pages=maker, registry=world.registry)  # type: ignore[arg-type]
    pages = Pages(world.ports, "pages", settle_s=0.0)
    controller = world.controller(world.request())
    controller.observe = pages
    return world, controller.drive(), pages


def test_each_stage_has_a_page_of_its_own_time_kept_with_the_version_and_linked() -> None:
    maker = FakePages()
    world, state, pages = told(maker)
    pages.close(10.0)
    assert state.phase is Phase.PROMOTED
    story = story_of(world.ledger.read("r1"))
    assert [page.what for page in story.pages] == ["shadow 100 %", "canary 20 %", "canary 50 %", "watching"]
    assert all(page.link.startswith("http://registry/2/r1-") for page in story.pages)
    times = [(since, until) for _, _, since, until in maker.asked]
    assert all(since < until for since, until in times)
    assert times == sorted(times)
    assert all(before[1] <= after[0] for before, after in pairwise(times))
    assert all(f'<a href="{page.link}">{page.what}</a>' in render(story) for page in story.pages)
    assert f"Evidently on canary 20 %: {story.pages[1].link}" in lines(explained(world.ledger, "r1"))


@pytest.mark.parametrize(
    "error",
    [
        PortError("Evidently could not compare: no"),
        NotThere("v2 has no sampled rows"),
        OSError(28, "No space left on device"),
        RuntimeError("what nobody has thought of (by the test)"),
    ],
)
def test_a_page_that_cannot_be_made_is_told_and_changes_nothing(error: Exception) -> None:
    def fail() -> None:
        raise error

    world, state, pages = told(FakePages(fail))
    pages.close(10.0)
    assert state.phase is Phase.PROMOTED
    story = story_of(world.ledger.read("r1"))
    assert [page.error for page in story.pages] == [str(error)] * 4
    assert "could not be made" in render(story)
    assert f"Evidently on watching: no page: {error}" in lines(explained(world.ledger, "r1"))


def test_a_page_that_the_ledger_does_not_take_at_once_is_told_later_in_its_turn() -> None:
    """The ledger is away, then the controller is quicker each time."""
    world, state, pages = told(FakePages(), [PortError("away"), *[Refused("the controller was quicker")] * 20])
    pages.close(10.0)
    assert state.phase is Phase.PROMOTED
    story = story_of(world.ledger.read("r1"))
    assert [page.what for page in story.pages] == ["shadow 100 %", "canary 20 %", "canary 50 %", "watching"]


def test_a_page_that_the_ledger_never_takes_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    free = threading.Event()
    world, _, pages = told(FakePages(lambda: assert_set(free)), errors=0.5)
    world.ledger.down = True
    free.set()
    pages.close(10.0)
    assert "the page on shadow 100 % of r1 could not be noted: the ledger does not answer" in caplog.messages


def test_a_page_that_is_not_made_in_time_is_told() -> None:
    free = threading.Event()
    world, _, pages = told(FakePages(lambda: assert_set(free)), errors=0.5)
    pages.close(0.05)
    story = story_of(world.ledger.read("r1"))
    assert [(page.what, page.error) for page in story.pages] == [
        ("shadow 100 %", "not made in 0.05 s after the rollout's end")
    ]
    free.set()
    pages.close(10.0)
    assert len(story_of(world.ledger.read("r1")).pages) == 1, "made all the same, it is not told again as a link"


def test_a_page_that_is_ready_when_the_time_is_over_is_told_once() -> None:
    """The worker is about to tell of the link as `close` gives up: one of them does, and `close` waits for that."""
    patched, reached, free = threading.Event(), threading.Event(), threading.Event()
    world, _, pages = told(FakePages(lambda: assert_set(patched)), errors=0.5)
    append = world.ledger.append

    def appends(*args: Any, **named: Any) -> Any:
        if args[4] == "noted" and not reached.is_set():
            reached.set()
            assert_set(free)
        return append(*args, **named)

    world.ledger.append = appends  # type: ignore[method-assign]
    patched.set()
    assert_set(reached)
    threading.Timer(0.2, free.set).start()
    pages.close(0.0)
    assert [(page.what, page.error) for page in story_of(world.ledger.read("r1")).pages] == [("shadow 100 %", "")]


def test_a_rollback_waits_for_no_page() -> None:
    """The page is not made before the rollout has ended; it is then about the rows until the failure."""
    ended = threading.Event()
    maker = FakePages(lambda: assert_set(ended))
    world, state, pages = told(maker, errors=0.5)
    assert state.phase is Phase.ROLLED_BACK
    assert maker.asked == []
    ended.set()
    pages.close(10.0)
    story = story_of(world.ledger.read("r1"))
    assert [page.link != "" for page in story.pages] == [True]
    failed = next(entry for entry in world.ledger.read("r1") if entry.body.get("verdict") == "fail")
    assert maker.asked[0][3] == failed.at
    done = [entry for entry in world.ledger.read("r1") if entry.kind != "noted"]
    assert story.ended == done[-1].at


def assert_set(event: threading.Event) -> None:
    assert event.wait(30.0)
