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

    Raises BadInput for bytes that are not those of the digest, or that cannot be run on these rows.
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
        for start in range(0, rows, size):
            part = {name: values[start : start + size] for name, values in feeds.items()}
            parts.append(predictor.of(model.run(part), min(size, rows - start)))
    except (CannotServe, ModelFailed, Refused) as exc:
        raise BadInput(f"the reference rows cannot be predicted: {exc}") from exc
    return np.concatenate(parts)
