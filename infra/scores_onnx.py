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
    onnx: Path, digest: str, feeds: Mapping[str, NDArray[Any]], output: str | None, column: int
) -> NDArray[Any]:
    """The prediction of each row, as the model server picks it; NaN where the model gives none.

    Raises BadInput for bytes that are not those of the digest, or that cannot be run on these rows, one that the model
    fails on among them.
    """
    return _predicted(onnx, digest, feeds, output, column, failures=False)[0]


def answers(
    onnx: Path, digest: str, feeds: Mapping[str, NDArray[Any]], output: str | None, column: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same, and which rows the model fails on: those, too, are without a prediction."""
    return _predicted(onnx, digest, feeds, output, column, failures=True)


def _predicted(
    onnx: Path, digest: str, feeds: Mapping[str, NDArray[Any]], output: str | None, column: int, failures: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    from serving.errors import CannotServe, ModelFailed, Refused
    from serving.model import Model
    from serving.server import predictor_for

    try:
        model = Model.load(onnx, digest)
        predictor = predictor_for(model.signature, output, column)
        rows = len(next(iter(feeds.values())))
        size = _BATCH if model.signature.batch else 1
        found, failed = np.full(rows, np.nan), np.zeros(rows, dtype=bool)

        def ask(start: int, count: int) -> None:
            found[start : start + count] = predictor.of(model.run(_rows(feeds, start, count)), count)

        for start in range(0, rows, size):
            count = min(size, rows - start)
            try:
                ask(start, count)
            except ModelFailed:
                if not failures:
                    raise
                for at in range(start, start + count):
                    try:
                        ask(at, 1)
                    except ModelFailed:
                        failed[at] = True
    except (CannotServe, ModelFailed, Refused) as exc:
        raise BadInput(f"the rows cannot be predicted: {exc}") from exc
    return found, failed


def _rows(feeds: Mapping[str, NDArray[Any]], start: int, count: int) -> dict[str, NDArray[Any]]:
    return {name: values[start : start + count] for name, values in feeds.items()}
