"""The inspector: what a sound model takes and gives; and for each unsound one a sentence that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from infra.inspector_onnx import OnnxInspector, single_file
from tasks.ports import BadInput, Signature, Tensor
from tests.infra.onnx_models import logistic, save


def inspect(model: Any, tmp_path: Path) -> Signature:
    return OnnxInspector().signature(save(model, tmp_path / "m.onnx"))


def test_the_signature_has_names_types_and_free_axes_and_leaves_initializers_out(tmp_path: Path) -> None:
    model = logistic()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 1]))  # as IR 3 wanted it
    assert inspect(model, tmp_path) == Signature(
        inputs=(Tensor("x", "FP32", (-1, 2)),), outputs=(Tensor("p", "FP32", (-1, 1)),)
    )


@pytest.mark.parametrize(
    ("onnx_type", "name"), [(TensorProto.STRING, "BYTES"), (TensorProto.INT64, "INT64"), (TensorProto.BOOL, "BOOL")]
)
def test_types_are_in_the_protocols_words(tmp_path: Path, onnx_type: int, name: str) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])],
        "g",
        [value("a", onnx_type, ["N", 1])],
        [value("b", onnx_type, ["N", 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    assert inspect(model, tmp_path).inputs[0].dtype == name


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    whole = logistic().SerializeToString()
    for name, content, says in (
        ("empty.onnx", b"", "the file is empty"),
        ("cut.onnx", whole[:-9], "not an ONNX model, or cut short"),
        ("words.onnx", b"PK\x03\x04 what is this", "not a"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}: {says}"):
            OnnxInspector().signature(path)
    with pytest.raises(BadInput, match=r"none\.onnx: no such file"):
        OnnxInspector().signature(tmp_path / "none.onnx")


def test_a_model_that_the_checker_or_shape_inference_refuses_is_not_sound(tmp_path: Path) -> None:
    dangling = logistic()
    dangling.graph.node[1].input[0] = "nowhere"
    with pytest.raises(BadInput, match=r"not a sound ONNX model: .*nowhere"):
        inspect(dangling, tmp_path)
    misshapen = logistic()
    misshapen.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 1), dtype="float32"), "w"))
    with pytest.raises(BadInput, match="not a sound ONNX model"):
        inspect(misshapen, tmp_path)


def test_an_opset_that_the_runtime_does_not_load_is_refused_with_the_newest_that_it_does(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"opset ai\.onnx 99 are not what ONNX Runtime .* loads.*till opset \d+"):
        inspect(logistic(opset=99), tmp_path)


def test_outputs_that_are_no_tensors_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model = logistic()
    model.graph.node[1].output[0] = "t"
    model.graph.node.append(helper.make_node("SequenceConstruct", ["t"], ["p"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("p", TensorProto.FLOAT, None))
    with pytest.raises(BadInput, match=r"output 'p' is a sequence, not a tensor.*'zipmap': False"):
        inspect(model, tmp_path)


def test_weights_in_other_files_are_taken_in_and_always_give_the_same_bytes(tmp_path: Path) -> None:
    model = logistic()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((2, 1), dtype="float32"), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="m.weights")
    with pytest.raises(BadInput, match=r"keeps weights outside, in 'm\.weights'"):
        OnnxInspector().signature(path)
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    whole = single_file(path, first)
    assert OnnxInspector().signature(whole).inputs[0].name == "x"
    assert whole.read_bytes() == single_file(path, second).read_bytes()
    (tmp_path / "m.weights").unlink()
    with pytest.raises(BadInput, match="weights lie in other files that cannot be read"):
        single_file(path, first)


def test_a_model_in_one_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = save(logistic(), tmp_path / "m.onnx")
    assert single_file(path, tmp_path) == path


def test_more_than_one_file_can_hold_is_told_with_the_size(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: takes no room
    with pytest.raises(BadInput, match=r"3\.0 GiB.*larger than the 2 GiB that one ONNX file holds"):
        OnnxInspector().signature(path)
