"""The report: everything in one file, nothing loaded, nothing of the outside taken for HTML, bounded however long."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infra.report_html import LOOKS_MAX, HtmlReporter, length, number, render, segments
from infra.report_plots import rates, thinned
from policies.evidence import Counts
from policies.verdict import GateReport, Verdict
from tasks.ports import Look, PortError, Story

START = 1_700_000_000.0
EVIL = "<script>alert('x')</script>"


def look(second: float, phase: str, weight: int, shadow: int, *reports: GateReport, requests: int = 0) -> Look:
    counts = Counts(requests, 0, epoch="live")
    return Look(START + second, phase, weight, shadow, reports, counts, counts)


def errors(estimate: float, verdict: Verdict = Verdict.HOLD) -> GateReport:
    return GateReport(
        "errors",
        verdict,
        f"errors {estimate}",
        estimate=estimate,
        low=-0.1,
        high=0.1,
        n=10,
        threshold=0.02,
        unit="rate",
    )


def story(**changes: object) -> Story:
    looks = [
        look(10, "shadow 100 %", 0, 100, errors(0.0), requests=10),
        look(11, "shadow 100 %", 0, 100, errors(0.01), requests=30),
        look(12, "canary 20 %", 20, 0, errors(0.012, Verdict.PASS), requests=35),
        look(15, "watching", 100, 25, errors(0.011, Verdict.PASS), GateReport("drift", Verdict.HOLD, "no window yet")),
    ]
    whole = Story(
        rollout="r-1",
        model="flight-delay",
        version="2",
        baseline="1",
        outcome="promoted",
        reason="every gate passed",
        started=START,
        ended=START + 20,
        looks=looks,
        checks=(GateReport("parity", Verdict.PASS, "largest difference 1e-06", estimate=1e-6, n=200, threshold=1e-4),),
        events=((START, "requested", "pending"), (START + 20, "done", "promoted: aliases")),
        candidate_requests=12_345,
        candidate_errors=2,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_the_whole_story_and_loads_nothing(tmp_path: Path) -> None:
    path = HtmlReporter().write(story(), tmp_path / "reports" / "r-1.html")
    text = path.read_text()
    page = Page(text)
    for said in ("flight-delay version 2", "promoted", "every gate passed", "version 1", "12,345", "20.0 s", "parity"):
        assert said in page.text
    for said in ("shadow 100 %", "canary 20 %", "watching", "errors 0.012", "no window yet", "promoted: aliases"):
        assert said in page.text
    assert page.tags.count("svg") == 3, "the traffic and one plot for each of two gates"
    assert [target for target in page.loaded if not target.startswith("#")] == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert "script" not in page.tags


def test_the_plots_take_the_colours_of_the_page_and_share_no_ids(tmp_path: Path) -> None:
    text = render(story())
    assert not re.search(r"#0102\d\d", text), "a stand-in colour was left"
    assert "var(--candidate)" in text.split("<svg", 1)[1]
    painted = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", "".join(text.split("<svg ")[1:])))
    assert all(paint in ("none", "currentColor") or paint.startswith("var(--") for paint in painted), painted
    ids = [set(re.findall(r'id="([mp][0-9a-f]{8,})"', svg)) for svg in text.split("<svg ")[1:]]
    assert all(not (a & b) for at, a in enumerate(ids) for b in ids[at + 1 :])


def test_what_comes_from_outside_is_text_and_nothing_else() -> None:
    evil = GateReport(EVIL, Verdict.FAIL, EVIL, estimate=1.0, low=0.0, high=2.0, threshold=0.5, unit=EVIL, needs=EVIL)
    text = render(
        story(
            model=EVIL,
            reason=EVIL,
            rollout=EVIL,
            looks=[look(1, EVIL, 5, 0, evil)],
            checks=[evil],
            events=[(START, EVIL, EVIL)],
        )
    )
    assert "script" not in Page(text).tags


def test_a_rollout_refused_before_any_traffic_has_a_page_too() -> None:
    text = render(story(outcome="refused", looks=(), events=(), reason="parity failed", baseline=None))
    page = Page(text)
    assert "nothing: the first version" in page.text
    assert "svg" not in page.tags


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_numbers_that_are_none_leave_a_gap_and_not_an_error(value: float | None) -> None:
    report = GateReport(
        "errors", Verdict.ERROR, "could not look", estimate=value, low=value, high=value, threshold=value
    )
    assert "could not look" in render(story(looks=[look(1, "canary 5 %", 5, 0, report)], checks=[report]))


def test_a_rollout_of_many_looks_stays_a_page_that_opens() -> None:
    many = [look(i, "watching", 100, 10, errors(0.01, Verdict.PASS), requests=i) for i in range(20_000)]
    text = render(story(looks=many, ended=START + 20_000))
    assert f"20000 looks, {LOOKS_MAX} of them shown" in text
    assert len(text) < 2_000_000
    assert thinned(many, 400)[-1] is many[-1]
    assert thinned([], 400) == []


def test_the_phases_cover_the_rollout_without_a_gap() -> None:
    parts = list(segments(story()))
    assert [(p.phase, p.start - START, p.end - START) for p in parts] == [
        ("checks, deployment", 0.0, 10.0),
        ("shadow 100 %", 10.0, 12.0),
        ("canary 20 %", 12.0, 15.0),
        ("watching", 15.0, 20.0),
    ]


def test_a_counter_that_begins_anew_is_no_negative_rate() -> None:
    def at(second: float, requests: int, epoch: str) -> Look:
        return Look(second, "p", 0, 0, (), Counts(requests, 0, epoch=epoch), None)

    looks = [at(0, 0, "a"), at(1, 50, "a"), at(2, 10, "b"), at(3, 40, "b"), at(4, 5, "b"), at(6, 45, "b")]
    assert rates(looks, candidate=False) == ([1, 3, 6], [50.0, 30.0, 20.0])
    assert rates(looks, candidate=True) == ([], [])


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PortError, match="the report of r-1 cannot be written to"):
        HtmlReporter().write(story(), tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.30000000000000004, "0.3"), (1234567.0, "1.23e+06"), (12345.0, "12,345"), (-0.01, "-0.01"), (1e-6, "1e-06")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_lengths_are_in_a_persons_units(seconds: float, text: str) -> None:
    assert length(seconds) == text
