"""The plots of a rollout's report, as inline SVG: traffic over time, and each gate's evidence over time.

matplotlib draws with stand-in colours; they are replaced by CSS variables of the page, so that the plots follow its
light and dark colours. Text stays text. Nothing is loaded from outside.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from policies.evidence import Counts
from policies.verdict import GateReport, Verdict
from tasks.ports import Look

POINTS_MAX = 600  # more than the plot has pixels to tell apart
# Stand-in -> what the page says. Stand-ins are colours that matplotlib writes as they are.
_PAINT = {
    "#010203": "currentColor",
    "#010204": "var(--grid)",
    "#010205": "var(--candidate)",
    "#010206": "var(--stable)",
    "#010207": "var(--threshold)",
    "#010208": "var(--band)",
    "#010211": "var(--pass)",
    "#010212": "var(--hold)",
    "#010213": "var(--error)",
    "#010214": "var(--fail)",
}
_INK, _GRID, _CANDIDATE, _STABLE, _THRESHOLD, _BAND = list(_PAINT)[:6]
_VERDICT = dict(zip((Verdict.PASS, Verdict.HOLD, Verdict.ERROR, Verdict.FAIL), list(_PAINT)[6:], strict=True))
_STYLE = {
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "xtick.labelcolor": _INK,
    "ytick.color": _INK,
    "ytick.labelcolor": _INK,
}


def thinned(looks: Sequence[Look], most: int) -> list[Look]:
    """At most `most` looks, evenly spaced, the last one always among them."""
    step = math.ceil(len(looks) / most) if looks else 1
    kept = list(looks[::step])
    if looks and kept[-1] is not looks[-1]:
        kept[-1] = looks[-1]
    return kept


def rates(looks: Sequence[Look], candidate: bool) -> tuple[list[float], list[float]]:
    """Requests per second between looks: times, rates. A counter that began anew or ran back gives no point."""
    times: list[float] = []
    found: list[float] = []
    before: tuple[float, Counts] | None = None
    for look in looks:
        counts = look.candidate if candidate else look.stable
        if counts is None:
            continue
        if before is not None and before[1].epoch == counts.epoch:
            passed, more = look.at - before[0], counts.requests - before[1].requests
            if passed > 0 and more >= 0:
                times.append(look.at)
                found.append(more / passed)
        before = look.at, counts
    return times, found


def traffic(looks: Sequence[Look], started: float, after: tuple[float, int] | None = None) -> str:
    """Percent of the live traffic on the candidate and copied to the shadow; below, requests per second of both.

    `after` says when the rollout ended and with what weight.
    """
    figure, (shares, load) = _figure(7.6, 3.6, rows=2, height_ratios=(3, 2))
    kept = thinned(looks, POINTS_MAX)
    seconds = [look.at - started for look in kept]
    weight = [look.weight for look in kept]
    shadow = [look.shadow for look in kept]
    if after is not None:
        seconds, weight, shadow = [*seconds, after[0] - started], [*weight, after[1]], [*shadow, 0]
    shares.fill_between(seconds, weight, step="post", color=_CANDIDATE, alpha=0.18, linewidth=0)
    shares.step(seconds, weight, where="post", color=_CANDIDATE, linewidth=2, label="live traffic on the candidate")
    if any(shadow):
        shares.step(seconds, shadow, where="post", color=_STABLE, linewidth=1.4, linestyle=(0, (2, 2)), label="copied")
    shares.set_ylim(-3, 108)
    shares.set_ylabel("percent")
    shares.legend(
        loc="upper left", fontsize=8, ncols=2, frameon=False, labelcolor=_INK, bbox_to_anchor=(0, 1.2), borderaxespad=0
    )
    for candidate, colour, name in ((False, _STABLE, "stable"), (True, _CANDIDATE, "candidate")):
        times, found = rates(kept, candidate)
        load.plot([t - started for t in times], found, color=colour, linewidth=1.4, label=name)
    load.set_ylim(bottom=0)
    load.set_ylabel("requests/s")
    load.set_xlabel("seconds since the start")
    load.legend(
        loc="upper left", fontsize=8, ncols=2, frameon=False, labelcolor=_INK, bbox_to_anchor=(0, 1.25), borderaxespad=0
    )
    shares.tick_params(labelbottom=False)
    load.set_xlim(shares.get_xlim())
    return _svg(figure, f"Traffic of {len(looks)} looks")


def gate(name: str, looks: Sequence[Look], started: float) -> str:
    """One gate over time: estimate, interval, threshold, and along the bottom what it said at each look."""
    said = [(look.at - started, report) for look in looks for report in look.reports if report.gate == name]
    step = math.ceil(len(said) / POINTS_MAX) if said else 1
    said = said[::step]
    figure, (axes,) = _figure(3.7, 2.1)
    reports = [report for _, report in said]
    # Drift is not looked at each time: its line goes from one estimate to the next.
    told = [(at, report) for at, report in said if report.estimate is not None]
    seconds, spoken = [at for at, _ in told], [report for _, report in told]
    axes.fill_between(seconds, _series(spoken, "low"), _series(spoken, "high"), color=_BAND, alpha=0.35, linewidth=0)
    axes.plot(seconds, _series(spoken, "estimate"), color=_CANDIDATE, linewidth=1.6, marker="o", markersize=2.2)
    held = [(at, report) for at, report in said if report.threshold is not None]
    dashed = {"color": _THRESHOLD, "linewidth": 1.2, "linestyle": (0, (4, 2))}
    axes.step([at for at, _ in held], _series([report for _, report in held], "threshold"), where="post", **dashed)
    _limits(axes, reports)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.14 * (top - bottom), top)
    for verdict, colour in _VERDICT.items():
        at = [moment for moment, report in said if report.verdict is verdict]
        axes.scatter(at, [bottom - 0.08 * (top - bottom)] * len(at), s=9, marker="s", color=colour, linewidths=0)
    unit = next((report.unit for report in reports if report.unit), "")
    axes.set_ylabel(unit[:24])
    axes.set_xlabel("seconds")
    return _svg(figure, f"{name} over time")


def _series(reports: Sequence[GateReport], field: str) -> list[float]:
    """The field of each report, NaN (a gap in the line) where there is none."""
    values = [getattr(report, field) for report in reports]
    return [float(value) if value is not None and math.isfinite(value) else math.nan for value in values]


def _limits(axes: Any, reports: Sequence[GateReport]) -> None:
    """All estimates and thresholds are in view; of the intervals, wide at first, so much as keeps the rest readable."""
    import numpy as np

    core = [v for f in ("estimate", "threshold") for v in _series(reports, f) if math.isfinite(v)]
    if not core:
        axes.set_ylim(0, 1)
        return
    low, high = min(core), max(core)
    ends = [v for f in ("low", "high") for v in _series(reports, f) if math.isfinite(v)]
    if ends:
        low, high = min(low, float(np.quantile(ends, 0.15))), max(high, float(np.quantile(ends, 0.85)))
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _figure(width: float, height: float, rows: int = 1, height_ratios: Sequence[float] = (1,)) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(
            figsize=(width, height), layout="constrained"
        )  # no pyplot: it keeps figures and is not thread-safe
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, 1, squeeze=False, gridspec_kw={"height_ratios": height_ratios})[:, 0]
        for each in axes:
            each.grid(visible=True, axis="y")
            each.set_axisbelow(True)
            each.tick_params(length=0)
    return figure, list(axes)


def _svg(figure: Any, title: str) -> str:
    from matplotlib import rc_context

    page = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": title}):  # ids that do not clash with the page's other plots
        figure.savefig(page, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = page.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, paint in _PAINT.items():
        text = text.replace(stand_in, paint)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%" role="img"', text, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg aria-label="{label}" ', 1)
