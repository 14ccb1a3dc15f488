"""The model: only the bytes that were asked for, and a signature that says what they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from serving.errors import CannotServe, ModelFailed
from serving.model import Model, SessionSettings
from serving.server import predictor_for
from serving.tensors import DATATYPES
from tests.serving import models

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("datatype", DATATYPES, ids=lambda datatype: datatype.name)
def test_every_datatype_goes_in_and_comes_out(path: Path, datatype) -> None:
    name = datatype.name
    models.echo(path, ONNX_TYPES.get(name) or getattr(TensorProto, name))
    model = Model.load(path)
    assert model.signature.inputs[0].datatype is datatype
    values = np.array([["a", "ü"]], dtype=object) if name == "BYTES" else np.array([[1, 0]], dtype=datatype.numpy)
    (given,) = model.run({"x": values})
    np.testing.assert_array_equal(given, values)
    assert given.dtype == datatype.numpy


def test_the_digest_may_be_written_either_way(path: Path) -> None:
    digest = models.score(path)
    assert Model.load(path, digest.upper()).digest == digest
    assert Model.load(path, f"sha256:{digest}").digest == digest


def test_one_changed_byte_is_refused(path: Path) -> None:
    digest = models.score(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CannotServe, match=f"but {digest} was asked for"):
        Model.load(path, digest)


def test_a_type_that_cannot_be_carried_is_named(path: Path) -> None:
    models.echo(path, TensorProto.BFLOAT16)
    with pytest.raises(CannotServe, match=r"'x' has the type tensor\(bfloat16\)"):
        Model.load(path)


def test_an_unknown_provider_is_named(path: Path) -> None:
    models.score(path)
    with pytest.raises(CannotServe, match="NoSuchProvider is not in this build; it has"):
        Model.load(path, settings=SessionSettings(providers=("NoSuchProvider",)))


def test_the_model_itself_may_forbid_nan(path: Path) -> None:
    models.score(path, metadata={"lockgate.finite": "f"})
    assert Model.load(path).signature.inputs[0].finite
    with pytest.raises(CannotServe, match="'g' must be finite, but is not an input"):
        Model.load(path, settings=SessionSettings(finite=("g",)))


def test_a_failing_run_says_what_the_runtime_said(path: Path) -> None:
    models.picky(path)
    with pytest.raises(ModelFailed, match="indices element out of data bounds"):
        Model.load(path).run({"i": np.array([7])})


def test_the_prediction_is_the_last_float_output_unless_said_otherwise(path: Path) -> None:
    nodes = [helper.make_node("Identity", ["f"], [name]) for name in ("a", "b")]
    nodes.append(helper.make_node("ArgMax", ["f"], ["label"], axis=1, keepdims=0))
    shape = ["N", 2]
    outputs = [("a", 1, shape), ("b", 1, shape), ("label", TensorProto.INT64, ["N"])]
    models.save(path, nodes, [("f", 1, shape)], outputs)
    model = Model.load(path)
    given = model.run({"f": np.array([[1, 2], [5, 4]], dtype=np.float32)})
    given[0] = given[0] * 10
    assert predictor_for(model.signature, None, -1).of(given, 2).tolist() == [2, 4]
    assert predictor_for(model.signature, "a", 0).of(given, 2).tolist() == [10, 50]
    assert predictor_for(model.signature, "label", -1).of(given, 2).tolist() == [1, 0]
    assert np.isnan(predictor_for(model.signature, "a", 7).of(given, 2)).all()
    with pytest.raises(CannotServe, match="no output 'c'; it has a, b, label"):
        predictor_for(model.signature, "c", -1)


def test_scikit_learn_s_class_probabilities_are_a_table(path: Path) -> None:
    """Its converters give a sequence of maps by default."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    fitted = LogisticRegression().fit(rows, rows[:, 0] > 0)
    path.write_bytes(to_onnx(fitted, rows[:1], target_opset=17).SerializeToString())
    model = Model.load(path)
    table = model.run({"X": rows[:4]})[1]
    np.testing.assert_allclose(table, fitted.predict_proba(rows[:4]), rtol=1e-4)
    assert model.signature.batch
