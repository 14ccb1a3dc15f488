"""Small ONNX models for tests, made by hand: sound ones, and ones with a certain fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper


def logistic(weights: tuple[float, float] = (1.0, -1.0), opset: int = 17, ir: int = 9) -> Any:
    """`p = sigmoid(x @ weights)`, x of shape [N, 2], p of shape [N, 1]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Sigmoid", ["s"], ["p"])],
        "logistic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor("w", TensorProto.FLOAT, [2, 1], list(weights))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def save(model: Any, path: Path) -> Path:
    onnx.save(model, path)
    return path
