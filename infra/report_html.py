"""Reporter: one rollout as one HTML page that needs nothing else: no network, no script, light or dark as the reader
has it, good on paper.

The page is made of `report.html.j2` and the plots of `report_plots`. Both vendors (Jinja2, matplotlib) are imported
when the first page is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from infra import report_plots
from policies.verdict import GateReport
from tasks.ports import Look, PortError, Story

LOOKS_MAX = 400  # rows of the table of looks; of more, every k-th is shown
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Segment:
    """A stretch of the rollout in one phase."""

    phase: str
    kind: str
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


class HtmlReporter:
    """`tasks.ports.Reporter`."""

    def write(self, story: Story, path: Path) -> Path:
        """A self-contained HTML page at the path. Raises PortError if it cannot be written."""
        page = render(story)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page, encoding="utf-8")
        except OSError as exc:
            raise PortError(
                f"the report of {story.rollout} cannot be written to {path}: {exc.strerror or exc}"
            ) from exc
        return path


def render(story: Story) -> str:
    """The page's text."""
    import jinja2

    # Everything that comes from the outside (names, reasons, messages of models) is escaped; only the plots are not.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "clock": _clock,
        "length": length,
        "interval": _interval,
        "length_of": len,
    }
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    looks = story.looks
    gates = list(dict.fromkeys(report.gate for look in looks for report in look.reports))
    return template.render(
        story=story,
        tone=_tone(story.outcome),
        segments=list(segments(story)),
        traffic=_safe(report_plots.traffic(looks, story.started, _after(story))) if looks else None,
        gates=[_gate(name, looks, story.started) for name in gates],
        shown=report_plots.thinned(looks, LOOKS_MAX),
    )


def segments(story: Story) -> Iterator[Segment]:
    """The phases in order, without gaps from the rollout's start to its end."""
    firsts = [(phase, next(group).at) for phase, group in groupby(story.looks, key=lambda look: look.phase)]
    begin = firsts[0][1] if firsts else story.ended
    if begin > story.started:
        yield Segment("checks, deployment" if firsts else "checks", "checks", story.started, begin)
    for (phase, at), (_, after) in pairwise([*firsts, ("", story.ended)]):
        yield Segment(phase, phase.split()[0], at, max(at, after))


def _gate(name: str, looks: Sequence[Look], started: float) -> dict[str, Any]:
    last = next(report for look in reversed(looks) for report in look.reports if report.gate == name)
    return {"name": name, "last": last, "plot": _safe(report_plots.gate(name, looks, started))}


def _safe(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704 - our own SVG; the gate's name in it is escaped


def _after(story: Story) -> tuple[float, int] | None:
    """When it ended and how much of the live traffic the candidate then had; None where the outcome does not say."""
    final = {"pass": 100, "fail": 0}.get(_tone(story.outcome))
    return None if final is None or story.outcome == "halted" else (story.ended, final)


def _tone(outcome: str) -> str:
    """The colour that the outcome is told in."""
    if outcome == "promoted":
        return "pass"
    return "fail" if outcome in ("rolled back", "rolled_back", "refused", "halted") else "hold"


def number(value: float | None) -> str:
    """Four significant figures, without the noise of a float; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}"


def _interval(report: GateReport) -> str:
    if report.low is None and report.high is None:
        return ""
    return f"{number(report.low)} to {number(report.high)}"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def length(seconds: float) -> str:
    """`42.0 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
