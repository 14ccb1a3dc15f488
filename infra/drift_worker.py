"""The process that compares windows with Evidently, at the other end of a pipe: `python -m infra.drift_worker FD`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.drift_resampling import Distance, by_repeating, drawn, present, shuffled, wasserstein, windows
from policies.evidence import ColumnDrift, Drift

_UPPER_SD = 2.33  # the normal quantile of 99 %


@dataclass(frozen=True)
class Columns:
    """A window's values by column, as the worker takes them; missing values are NaN or None. `requests` says which
    request each row is of, by number, from 0 without a gap; None: each row is its own. `newest` is the newest row's
    time, if rows have one."""

    values: Mapping[str, NDArray[Any]]
    rows: int
    requests: NDArray[np.int64] | None = None
    newest: float | None = None

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many rows each request has."""
        return np.ones(self.rows, np.int64) if self.requests is None else np.bincount(self.requests)

    @property
    def requests_as_equal(self) -> int | None:
        """How many requests of one size are worth as much (Kish, "Survey sampling", 1965, section 11.7); None where
        each row is its own."""
        return None if self.requests is None else int(self.rows**2 / (self.sizes.astype(float) ** 2).sum() + 1e-9)


def listen(connection: Connection, questions: SimpleQueue[Any]) -> None:
    """Takes questions in as they come, so that nobody waits to be rid of one; None when the other side is gone."""
    try:
        while True:
            questions.put(connection.recv())
    except (EOFError, OSError):
        questions.put(None)


def work(connection: Connection, questions: SimpleQueue[Any]) -> None:
    """Answers questions until the other side is gone."""
    import warnings

    warnings.simplefilter("ignore")
    while (question := questions.get()) is not None:
        number, kind, body = question
        try:
            answer: Any = compare(*body) if kind == "compare" else _write_report(*body)
            error = None
        except Exception as exc:  # noqa: BLE001 - whatever Evidently raises is the answer to this question, not our end
            answer, error = None, f"{type(exc).__name__}: {' '.join(str(exc).split())}"
        try:
            connection.send((number, error, answer))
        except OSError:
            return  # nobody waits for it any more


def compare(reference: Columns, current: Columns, method: str, permutations: int, seed: int = 0) -> Drift:
    """The comparison itself; see `EvidentlyDrift.compare`. Imports Evidently."""
    generator = np.random.default_rng(seed)
    names = list(reference.values)
    rows, counts = (reference.rows, current.rows), (len(reference.sizes), len(current.sizes))
    of = _pooled(reference, current)
    seen, measures = np.zeros(len(names)), []
    if not any(present(side.values[name]).any() for side in (reference, current) for name in names):
        raise ValueError(f"column '{names[0]}' has nothing but missing values")
    for i, name in enumerate(names):
        sides = reference.values[name], current.values[name]
        pooled = np.concatenate(sides)
        if not present(pooled).any():  # in either window, which is no difference
            measures.append(by_repeating(lambda _first, _second: 0.0, pooled))
            continue
        distance = _distance(method, pooled)
        both = by_repeating(distance, pooled)
        seen[i] = both(*windows(*counts, of))
        if not np.isfinite(seen[i]):
            raise ValueError(f"the {method} distance of column '{name}' is not finite")
        measures.append(wasserstein(pooled) if method == "wasserstein" else both)
    p_values, chance = shuffled(measures, *counts, permutations, generator, of)
    anew = drawn(measures, *counts, generator, of)
    mean, error = anew.mean(axis=0), anew.std(axis=0, ddof=1)
    # Distances of rows drawn anew are larger than the windows' own by the noise of a second sampling, which makes the
    # limit a safe one: windows a threshold apart were called nearer in 1 to 2 % of the comparisons (500 to 4,000 rows).
    high = np.maximum(mean + _UPPER_SD * error, seen)
    columns = tuple(
        ColumnDrift(
            column=name,
            method=method,
            statistic=float(seen[i]),
            p_value=float(p_values[i]),
            missing_stable=_missing(reference.values[name]),
            missing_candidate=_missing(current.values[name]),
            high=float(high[i]),
            error=float(error[i]),
            bias=max(float(mean[i] - seen[i]), 0.0),
        )
        for i, name in enumerate(names)
    )
    worth = reference.requests_as_equal, current.requests_as_equal
    known = reference.newest is not None and current.newest is not None
    newest = min(reference.newest or 0.0, current.newest or 0.0) if known else None
    return Drift(*rows, columns, float(chance), 1.0 / (permutations + 1), *worth, newest)


def _pooled(first: Columns, second: Columns) -> NDArray[np.int64] | None:
    """Which request each row of both windows is of, the first one's before the second's."""
    if first.requests is None and second.requests is None:
        return None
    sides = [np.arange(each.rows) if each.requests is None else each.requests for each in (first, second)]
    return np.concatenate([sides[0], len(first.sizes) + sides[1]])


def _distance(method: str, sample: NDArray[Any]) -> Distance:
    """Evidently's statistic, set explicitly (its default changes with the number of rows)."""
    import pandas as pd
    from scipy.stats import ks_2samp

    if method == "ks":
        # Evidently's `ks` gives the p-value of this very function; a distance is needed here.
        return lambda first, second: float(ks_2samp(first, second).statistic)
    from evidently.legacy.calculations.stattests import get_stattest
    from evidently.legacy.core import ColumnType

    kind = ColumnType.Categorical if sample.dtype == object else ColumnType.Numerical
    test = get_stattest(pd.Series(sample[:2]), pd.Series(sample[:2]), kind, method)
    return lambda first, second: float(test.func(pd.Series(first), pd.Series(second), kind, 0.1)[0])


def _missing(values: NDArray[Any]) -> float:
    return 1.0 - float(present(values).sum()) / max(values.size, 1)


def _write_report(reference: Columns, current: Columns, path: str, kept: tuple[str, str, float] | None) -> str:
    """Evidently's drift report; for people, not for verdicts."""
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    names = [name for name in reference.values if present(reference.values[name]).any()]
    names = [name for name in names if present(current.values[name]).any()]
    definition = DataDefinition(
        numerical_columns=[name for name in names if reference.values[name].dtype != object],
        categorical_columns=[name for name in names if reference.values[name].dtype == object],
    )
    frames = [
        Dataset.from_pandas(pd.DataFrame({name: window.values[name] for name in names}), data_definition=definition)
        for window in (current, reference)
    ]
    aside = f"{path}.part"
    timestamp = datetime.fromtimestamp(kept[2], UTC).replace(tzinfo=None) if kept else None  # Evidently's are naive
    run = Report([DataDriftPreset()], include_tests=False).run(frames[0], frames[1], timestamp=timestamp)
    run.save_html(aside)
    Path(aside).replace(path)
    if kept is not None:
        _keep(run, *kept[:2])
    return path


def _keep(run: Any, folder: str, name: str) -> None:
    """The run in the workspace's project of that name, which is made if it is not there."""
    from evidently.ui.workspace import Workspace

    workspace = Workspace.create(folder)
    found = workspace.search_project(name)
    project = found[0] if found else workspace.create_project(name)
    workspace.add_run(project.id, run)


def main(descriptor: int) -> None:
    """The worker's life: import first, so that the first question need not wait for it."""
    os.nice(10)  # a comparison may be late; the requests that it is about may not
    os.dup2(2, 1)  # what a vendor prints is for the log
    questions: SimpleQueue[Any] = SimpleQueue()
    with Connection(descriptor) as connection:
        threading.Thread(target=listen, args=[connection, questions], name="questions", daemon=True).start()
        import evidently.legacy.calculations.stattests  # noqa: F401

        work(connection, questions)


if __name__ == "__main__":
    main(int(sys.argv[1]))
