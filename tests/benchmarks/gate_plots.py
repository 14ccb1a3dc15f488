"""What the benchmark of the gates found, drawn: false rollbacks, and requests until detection, beside the peers."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any


def draw(raw: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files in the folder, of what `raw` holds."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    tables = {name: body for name, body in raw.items() if isinstance(body, dict)}
    healthy = {name: body["rolled back"] for name, body in tables.items() if "rolled back" in body}
    if healthy:
        made.append(_bars(healthy, "healthy versions rolled back", "share of rollouts", folder / "false_rollbacks.png"))
    caught = {name: body for name, body in tables.items() if "lockgate" in body}
    for key, title, unit in (
        ("caught", "bad versions caught", "share of rollouts"),
        ("median", "until caught (median)", "requests to the candidate"),
    ):
        table = {name: {who: row[key] or 0.0 for who, row in body.items()} for name, body in caught.items()}
        if table:
            made.append(_bars(table, title, unit, folder / f"{key}.png", log=key == "median"))
    return made


def _bars(table: dict[str, dict[str, float]], title: str, unit: str, path: Path, log: bool = False) -> Path:
    """A group of bars per case, a bar per judge."""
    from matplotlib.figure import Figure

    judges = list(dict.fromkeys(judge for row in table.values() for judge in row))
    figure = Figure(figsize=(2.5 + 2.2 * len(table), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(judges)
    for place, judge in enumerate(judges):
        axes.bar(
            [case + place * width for case in range(len(table))],
            [row.get(judge, 0.0) for row in table.values()],
            width,
            label=judge,
        )
    axes.set_xticks(
        [case + 0.4 - width / 2 for case in range(len(table))], [textwrap.fill(name, 24) for name in table], fontsize=7
    )
    axes.set(title=title, ylabel=unit)
    if log:
        axes.set_yscale("log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return path
