"""Small ONNX models for the tests, each made to show one thing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

Shape = Sequence[int | str | None]


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Shape]],
    outputs: Sequence[tuple[str, int, Shape]],
    constants: Sequence[tuple[str, np.ndarray]] = (),
    metadata: dict[str, str] | None = None,
) -> str:
    """Writes the graph; its SHA-256."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def score(path: Path, width: int = 4, metadata: dict[str, str] | None = None) -> str:
    """`f` FP32 [N, width] -> `score` FP32 [N, 1]: the sigmoid of the sum of the row."""
    return save(
        path,
        [
            helper.make_node("ReduceSum", ["f", "axis"], ["sum"], keepdims=1),
            helper.make_node("Sigmoid", ["sum"], ["score"]),
        ],
        [("f", TensorProto.FLOAT, ["N", width])],
        [("score", TensorProto.FLOAT, ["N", 1])],
        [("axis", np.array([1], dtype=np.int64))],
        metadata,
    )


def picky(path: Path) -> str:
    """`i` INT64 [N] -> `o` INT64 [N]: looks `i` up in [10, 20, 30, 40] and errs on an index beyond it."""
    return save(
        path,
        [helper.make_node("Gather", ["table", "i"], ["o"])],
        [("i", TensorProto.INT64, ["N"])],
        [("o", TensorProto.INT64, ["N"])],
        [("table", np.array([10, 20, 30, 40], dtype=np.int64))],
    )


def slow(path: Path) -> str:
    """`turns` INT64 [N] -> `o` FP32 [N]: takes time in proportion to the largest of `turns` (a Loop)."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("MatMul", ["held", "held"], ["squared"]),
            helper.make_node("Tanh", ["squared"], ["held_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("at", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held", TensorProto.FLOAT, [64, 64]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held_on", TensorProto.FLOAT, [64, 64]),
        ],
    )
    return save(
        path,
        [
            helper.make_node("ReduceMax", ["turns"], ["most"], keepdims=0),
            helper.make_node("Loop", ["most", "yes", "start"], ["held_last"], body=body),
            helper.make_node("ReduceMean", ["held_last"], ["mean"], keepdims=0),
            helper.make_node("Cast", ["turns"], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["as_float", "zero"], ["zeros"]),
            helper.make_node("Add", ["zeros", "mean"], ["o"]),
        ],
        [("turns", TensorProto.INT64, ["N"])],
        [("o", TensorProto.FLOAT, ["N"])],
        [
            ("yes", np.array(True)),
            ("zero", np.array(0, dtype=np.float32)),
            ("start", np.full((64, 64), 0.01, dtype=np.float32)),
        ],
    )


def two_inputs(path: Path) -> str:
    """`a` FP32 [N, W] and `s` BYTES [N] -> `total` FP32 [N] and `same` BYTES [N]; W is free."""
    return save(
        path,
        [
            helper.make_node("ReduceSum", ["a", "axis"], ["total"], keepdims=0),
            helper.make_node("Identity", ["s"], ["same"]),
        ],
        [("a", TensorProto.FLOAT, ["N", "W"]), ("s", TensorProto.STRING, ["N"])],
        [("total", TensorProto.FLOAT, ["N"]), ("same", TensorProto.STRING, ["N"])],
        [("axis", np.array([1], dtype=np.int64))],
    )


def rows_that_look_at_each_other(path: Path) -> str:
    """`f` FP32 [N] -> `o` FP32 [N]: each value less the largest of the batch. Its shapes alone look batchable."""
    return save(
        path,
        [helper.make_node("ReduceMax", ["f"], ["most"], keepdims=1), helper.make_node("Sub", ["f", "most"], ["o"])],
        [("f", TensorProto.FLOAT, ["N"])],
        [("o", TensorProto.FLOAT, ["N"])],
    )


def one_row_only(path: Path) -> str:
    """`f` FP32 [1, 4] -> `o` FP32 [1, 4], doubled: a model that forbids batching."""
    return save(
        path,
        [helper.make_node("Add", ["f", "f"], ["o"])],
        [("f", TensorProto.FLOAT, [1, 4])],
        [("o", TensorProto.FLOAT, [1, 4])],
    )


def echo(path: Path, datatype: int) -> str:
    """`x` -> `y`, the same, of the ONNX type `datatype`, [N, 2]."""
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", datatype, ["N", 2])],
        [("y", datatype, ["N", 2])],
    )
