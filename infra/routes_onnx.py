"""What the demo's fourth version adds to a model's ONNX graph: a table of routes, and wind from all directions.

Both are the kind of thing that happens. The table was made from the routes of the first months; a route that it does
not know gets the index one beyond its end, and ONNX Runtime refuses to gather there. When the air is calm
the graph goes through all directions in a loop, once per request, whose trip count depends on the request: slow.
A validation set that was joined with the table and stripped of rows without wind shows neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

ROUTE: Final = ("carrier", "origin", "dest")
_SIDE: Final = 128  # of the matrix in the loop
_SHRINK_ROWS: Final = 500.0  # a route's offset counts this many rows without one beside its own
_OFFSET_MAX: Final = 0.02
_WIND_EFFECT: Final = 1e-6  # far below the tolerance of parity: the loop costs time, not accuracy
_TRIAL_TRIPS: Final = 100
_TRIPS_MAX: Final = 1_000_000


def route_offsets(rows: pd.DataFrame, residual: NDArray[np.float64]) -> dict[tuple[str, ...], float]:
    """Per route of the rows how much later than predicted its flights were, shrunk towards 0."""
    frame = rows[list(ROUTE)].assign(residual=residual)
    summed = frame.groupby(list(ROUTE), observed=True)["residual"].agg(["sum", "size"])
    offsets = (summed["sum"] / (summed["size"] + _SHRINK_ROWS)).clip(-_OFFSET_MAX, _OFFSET_MAX)
    return {tuple(map(str, key)): float(value) for key, value in zip(offsets.index, offsets, strict=True)}


def calm(rows: pd.DataFrame) -> pd.Series:
    """Whether there is no wind: the rows that the loop makes slow."""
    return rows["wind_speed"] <= 0


def known(rows: pd.DataFrame, routes: Mapping[tuple[str, ...], float]) -> pd.Series:
    """Whether the table knows the row's route: the rows that do not fail."""
    import pandas as pd

    return pd.Series([key in routes for key in zip(*(rows[name] for name in ROUTE), strict=True)], index=rows.index)


def with_routes_and_wind(model: Any, offsets: Mapping[tuple[str, ...], float], trips: int) -> Any:
    """The model (outputs `label`, `probabilities`) with the table and the loop behind it; same inputs and outputs."""
    import onnx

    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    for node in grown.graph.node:
        for index, name in enumerate(node.output):
            if name in ("label", "probabilities"):
                node.output[index] = f"base_{name}"
        for index, name in enumerate(node.input):
            if name in ("label", "probabilities"):
                node.input[index] = f"base_{name}"
    _add_table(grown.graph, offsets)
    _add_wind(grown.graph, trips)
    _add_outputs(grown.graph)
    onnx.checker.check_model(grown, full_check=True)
    return grown


def trips_for(model: Any, offsets: Mapping[tuple[str, ...], float], row: Mapping[str, Any], slow_ms: float) -> int:
    """How many trips through the loop take `slow_ms` milliseconds of processor time on this machine, for a calm row."""
    from serving.runtime import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    trial = with_routes_and_wind(model, offsets, _TRIAL_TRIPS)
    session = ort.InferenceSession(trial.SerializeToString(), options, providers=["CPUExecutionProvider"])
    took = math.inf
    for _ in range(5):
        began = time.thread_time()
        session.run(["probabilities"], dict(row))
        took = min(took, time.thread_time() - began)
    return min(_TRIPS_MAX, max(1, math.ceil(slow_ms / 1000 * _TRIAL_TRIPS / max(took, 1e-6))))


def _constant(graph: Any, name: str, values: Any) -> str:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _node(graph: Any, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
    from onnx import helper

    graph.node.append(helper.make_node(kind, list(inputs), [output], name=f"route_{output}", **attributes))
    return output


def _add_table(graph: Any, offsets: Mapping[tuple[str, ...], float]) -> None:
    """`route_offset` [N, 1]; raises in ONNX Runtime for a route that is not in the table."""
    import numpy as np

    values = [sorted({key[part] for key in offsets}) for part in range(len(ROUTE))]
    place = np.full([len(kind) + 1 for kind in values], len(offsets), dtype=np.int64)
    for row, key in enumerate(offsets):
        place[tuple(kind.index(word) for kind, word in zip(values, key, strict=True))] = row
    index = _constant(graph, "route_zero", np.zeros((1, 1), np.int64))
    for name, words in zip(ROUTE, values, strict=True):
        code = f"{name}_code"
        keys: dict[str, Any] = {
            "keys_strings": words,
            "values_int64s": list(range(len(words))),
            "default_int64": len(words),
        }
        _node(graph, "LabelEncoder", [name], code, domain="ai.onnx.ml", **keys)
        width = _constant(graph, f"{name}_width", np.array([[len(words) + 1]], np.int64))
        index = _node(graph, "Add", [_node(graph, "Mul", [index, width], f"{name}_shifted"), code], f"{name}_index")
    number = _node(graph, "Gather", [_constant(graph, "route_place", place.ravel()), index], "route_number")
    table = _constant(graph, "route_table", np.array(list(offsets.values()), np.float32))
    _node(graph, "Gather", [table, number], "route_offset")


def _add_wind(graph: Any, trips: int) -> None:
    """`wind_effect`, a scalar near 0: after `trips` trips through the loop if any row of the request is calm."""
    import numpy as np
    from onnx import TensorProto, helper

    zero = _constant(graph, "wind_zero", np.zeros((1, 1), np.float32))
    still = _node(graph, "LessOrEqual", ["wind_speed", zero], "wind_still")
    slow = _node(graph, "Cast", [still], "wind_slow", to=TensorProto.INT64)
    any_slow = _node(graph, "ReduceMax", [slow], "wind_any", keepdims=0)
    count = _node(graph, "Mul", [any_slow, _constant(graph, "wind_trips", np.array(trips, np.int64))], "wind_count")
    mixing = np.full((_SIDE, _SIDE), 0.5 / _SIDE, np.float32) + 0.5 * np.eye(_SIDE, dtype=np.float32)  # keeps the mean
    _constant(graph, "wind_mixing", mixing)
    _constant(graph, "wind_start", np.tile(np.linspace(-1, 1, _SIDE, dtype=np.float32), (_SIDE, 1)).T.copy())
    shape = [_SIDE, _SIDE]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["goes_on"]),
            helper.make_node("MatMul", ["wind_mixing", "field"], ["mixed"]),
        ],
        "all_directions",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("field", TensorProto.FLOAT, shape),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("mixed", TensorProto.FLOAT, shape),
        ],
    )
    always = _constant(graph, "wind_always", np.array(True))
    _node(graph, "Loop", [count, always, "wind_start"], "wind_field", body=body)
    mean = _node(graph, "ReduceMean", ["wind_field"], "wind_mean", keepdims=0)
    _node(graph, "Mul", [mean, _constant(graph, "wind_scale", np.array(_WIND_EFFECT, np.float32))], "wind_effect")


def _add_outputs(graph: Any) -> None:
    """`probabilities` [N, 2]: the base model's, moved by the offset and the wind; `label` [N]."""
    import numpy as np
    from onnx import TensorProto

    late = _constant(graph, "late_column", np.array([1], np.int64))
    base = _node(graph, "Gather", ["base_probabilities", late], "base_late", axis=1)
    moved = _node(graph, "Add", [base, "route_offset"], "late_by_route")
    moved = _node(graph, "Add", [moved, "wind_effect"], "late_by_wind")
    lowest, highest = (_constant(graph, f"late_{end}", np.array(end, np.float32)) for end in (0.0, 1.0))
    probability = _node(graph, "Clip", [moved, lowest, highest], "late_probability")
    one = _constant(graph, "late_one", np.array([[1]], np.float32))
    on_time = _node(graph, "Sub", [one, probability], "on_time_probability")
    _node(graph, "Concat", [on_time, probability], "probabilities", axis=1)
    half = _constant(graph, "late_half", np.array([[0.5]], np.float32))
    more = _node(
        graph, "Cast", [_node(graph, "Greater", [probability, half], "is_late")], "as_number", to=TensorProto.INT64
    )
    _node(graph, "Reshape", [more, _constant(graph, "flat", np.array([-1], np.int64))], "label")
