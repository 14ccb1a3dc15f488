"""A model's own predictions on rows of a file, in this process: for rows that must not count as live traffic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.ports import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH = 1024


def predictions(
    onnx: Path,
    digest: str,
    feeds: Mapping[str, NDArray[Any]],
    output: str | None,
    column: int,
    failures: bool = False,
) -> NDArray[Any]:
    """The prediction of each row, as the model server picks it; NaN where the model gives none.

    With `failures`, a row that the model fails on is one without a prediction. Raises BadInput for bytes that are not
    those of the digest, or that cannot be run on these rows.
    """
    import numpy as np

    from serving.errors import CannotServe, ModelFailed, Refused
    from serving.model import Model
    from serving.server import predictor_for

    try:
        model = Model.load(onnx, digest)
        predictor = predictor_for(model.signature, output, column)
        rows = len(next(iter(feeds.values())))
        size = _BATCH if model.signature.batch else 1
        parts = []

        def one(at: int) -> NDArray[Any]:
            try:
                return np.asarray(predictor.of(model.run(_rows(feeds, at, 1)), 1))
            except ModelFailed:
                return np.array([np.nan])

        for start in range(0, rows, size):
            count = min(size, rows - start)
            try:
                parts.append(predictor.of(model.run(_rows(feeds, start, count)), count))
            except ModelFailed:
                if not failures:
                    raise
                parts.append(np.concatenate([one(at) for at in range(start, start + count)]))
    except (CannotServe, ModelFailed, Refused) as exc:
        raise BadInput(f"the rows cannot be predicted: {exc}") from exc
    return np.concatenate(parts)


def _rows(feeds: Mapping[str, NDArray[Any]], start: int, count: int) -> dict[str, NDArray[Any]]:
    return {name: values[start : start + count] for name, values in feeds.items()}
