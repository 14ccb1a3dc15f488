"""A period's sampled rows beside the rows that the version was made with, as Parquet files; and the labels that came.

The reference is the sample of training rows that came with the version; where none did, its validation rows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import rows, scores_onnx
from infra.labels_arrow import LabelStore
from infra.outcomes_arrow import Key, added, answers, labels, loss
from infra.samples_arrow import SampledRows
from policies.evidence import MONITOR_ROWS_MAX, Sums
from tasks.ports import Bundle, ModelVersion, NotThere, PortError
from tasks.ports_monitor import Chosen, Window

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

_ANSWERS_MAX = 200_000


class SampledWindows:
    """`tasks.ports_monitor.Windows` on what the servers of one agent sampled."""

    def __init__(self, agent_home: Path) -> None:
        self._samples, self._labels = SampledRows(agent_home), LabelStore(agent_home)

    def write(
        self, version: ModelVersion, bundle: Bundle, chosen: Chosen, since: float, until: float, folder: Path
    ) -> Window:
        import numpy as np
        import pyarrow as pa

        live = self._answered(version, since, until)
        source = bundle.reference or bundle.validation
        if source is None:
            raise NotThere(
                f"v{version.version} came without a sample of its training rows; deliver it with --reference FILE"
            )
        table, columns, predicted = _reference(version, bundle.onnx, source, chosen)
        missing = [name for name in columns if name not in live.column_names]
        kept = {name: column for name, column in columns.items() if name not in missing}
        if not kept:
            raise NotThere(
                f"the sampled rows hold none of the inputs ({', '.join(missing)}); they are too wide to keep"
            )
        order, half = _halves(live["request_id"].to_pylist())
        now = live.take(pa.array(order))
        sides = {
            "live": {own: now[name] for name, (own, _) in kept.items()} | {rows.PREDICTION: now[rows.PREDICTION]},
            "reference": {own: pa.array(values) for own, values in kept.values()} | {rows.PREDICTION: predicted},
        }
        folder.mkdir(parents=True, exist_ok=True)
        texts = {own for own, values in kept.values() if values.dtype == object}
        return Window(
            live=_write(sides["live"], folder / "live.parquet"),
            live_rows=now.num_rows,
            live_half=half,
            reference=_write(sides["reference"], folder / "reference.parquet"),
            reference_rows=table.num_rows,
            reference_half=table.num_rows // 2,
            reference_name="training rows" if bundle.reference else "validation rows",
            numbers=tuple(own for own, _ in kept.values() if own not in texts),
            texts=tuple(sorted(texts)),
            predictions=tuple(np.asarray(now[rows.PREDICTION], dtype=float).tolist()),
            known=_known(version, bundle, chosen),
        )

    def losses(self, version: ModelVersion, metric: str, since: float, until: float, wait: float) -> tuple[Sums, int]:
        table = self._samples.read(version.model, version.version, since - wait, _ANSWERS_MAX)
        # Its period is [since, until), theirs (after, until].
        answered = dict(answers(table, -math.inf, math.nextafter(until, -math.inf)))
        came: dict[Key, float] = {}
        labelled: set[str] = set()
        unknown = 0
        for _, segment in self._labels.after(version.model, 0):
            for key, (label, at) in labels(segment):
                labelled.add(key[0])
                unknown += since <= at < until and key not in answered
                if since <= at < until and key in answered and at - answered[key][1] <= wait:
                    came[key] = label
        if unknown and not came and table.num_rows >= _ANSWERS_MAX:
            raise NotThere(
                f"the {unknown:,} labels that came are of none of the newest {_ANSWERS_MAX:,} answers; no older ones"
                " are read: they come too late for so much traffic; sample a smaller share of it"
            )
        requests: dict[str, list[float]] = {}
        for key, label in came.items():
            requests.setdefault(key[0], []).append(loss(metric, answered[key][0], label))
        return added(requests.values()), len({request for request, _ in answered} - labelled)

    def known_losses(self, window: Window, metric: str) -> Sums:
        if window.known is None:
            return Sums()
        return added([loss(metric, score, truth)] for score, truth in zip(*window.known, strict=True))

    def _answered(self, version: ModelVersion, since: float, until: float) -> pa.Table:
        """The period's answered rows, at most so many, spread over the period."""
        import numpy as np
        import pyarrow.compute as pc

        table = self._samples.spread(version.model, version.version, since, until)
        if table.num_rows:
            table = table.filter(pc.less(table["status"], 400))
        if table.num_rows == 0:
            raise NotThere(f"v{version.version} has no sampled row of this period")
        if table.num_rows > MONITOR_ROWS_MAX:
            table = table.take(np.linspace(0, table.num_rows - 1, MONITOR_ROWS_MAX).astype(np.int64))
        return table


def _halves(requests: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """An order of the rows in which one half of the requests comes first, and how many rows that half has."""
    import numpy as np

    second = np.array([zlib.crc32(request.encode()) >> 7 & 1 for request in requests], dtype=bool)
    return np.concatenate([np.flatnonzero(~second), np.flatnonzero(second)]), int((~second).sum())


def _reference(
    version: ModelVersion, onnx: Path, source: Path, chosen: Chosen
) -> tuple[pa.Table, dict[str, tuple[str, NDArray[Any]]], NDArray[Any]]:
    """The rows in an order of chance that is the same each time; their inputs by sampled name; their predictions."""
    import numpy as np

    table = rows.read(source, text=rows.text_inputs(version.signature))
    order = np.random.default_rng(zlib.crc32(version.digest.encode())).permutation(table.num_rows)[:MONITOR_ROWS_MAX]
    table = table.take(order)
    columns = rows.input_columns(table, version.signature, source, chosen.label)
    feeds = rows.feeds(table, version.signature, source, chosen.label)
    predicted = scores_onnx.predictions(onnx, version.digest, feeds, chosen.output, chosen.column)
    return table, columns, predicted


def _known(version: ModelVersion, bundle: Bundle, chosen: Chosen) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Predictions and truth of the validation rows, if they have a truth."""
    import numpy as np

    if bundle.validation is None:
        return None
    table, _, predicted = _reference(version, bundle.onnx, bundle.validation, chosen)
    if chosen.label not in table.column_names:
        return None
    truth = rows.label(table, chosen.label, bundle.validation)
    sound = np.isfinite(predicted) & (truth >= 0.0) & (truth <= 1.0)
    return tuple(predicted[sound].tolist()), tuple(truth[sound].tolist())


def _write(columns: dict[str, Any], path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.table(columns), path)
    except (OSError, pa.ArrowException) as exc:
        raise PortError(f"{path} cannot be written: {exc}") from exc
    return path
