"""Inspector: reads an ONNX file without running it.

Sound means: the ONNX checker accepts it (with shape inference, unless it uses operators of a vendor's domain), the
installed ONNX Runtime knows its IR version and operator sets, its weights are within the file (the file's digest then
speaks for all of it; `single_file` puts them there), and every input and output is a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.rows import first_line
from serving.signing import NotSigned, Proof
from tasks.ports import BadInput, Refused, Signature, Tensor

# A protobuf message, and so an ONNX file, ends at 2 GiB.
PROTOBUF_BYTES_MAX = 2**31 - 1
_STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
# onnx.TensorProto.DataType by name -> Open Inference Protocol v2 datatype.
_OIP_OF = {
    "FLOAT": "FP32",
    "DOUBLE": "FP64",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "INT8": "INT8",
    "INT16": "INT16",
    "INT32": "INT32",
    "INT64": "INT64",
    "UINT8": "UINT8",
    "UINT16": "UINT16",
    "UINT32": "UINT32",
    "UINT64": "UINT64",
    "BOOL": "BOOL",
    "STRING": "BYTES",
}


class OnnxInspector:
    """`tasks.ports.Inspector` by the `onnx` package; ONNX Runtime is asked only for the versions that it knows."""

    def signed(self, onnx: Path, signature: str, keys: Sequence[str]) -> None:
        """Raises Refused unless one of the public keys has signed the file's bytes so."""
        try:
            Proof(signature, keys).check(onnx.read_bytes())
        except NotSigned as exc:
            raise Refused(str(exc)) from exc

    def signature(self, onnx: Path) -> Signature:
        """What the model takes and gives. Raises BadInput with the reason if it is no sound ONNX model."""
        model = _parsed(onnx)
        _refuse_external_data(model, onnx)
        _check(model, onnx)
        _check_versions(model, onnx)
        initialized = {tensor.name for tensor in model.graph.initializer}
        inputs = tuple(_tensor(v, onnx, "input") for v in model.graph.input if v.name not in initialized)
        outputs = tuple(_tensor(v, onnx, "output") for v in model.graph.output)
        if not inputs or not outputs:
            raise BadInput(f"{onnx}: the model has no {'outputs' if inputs else 'inputs'}; there is nothing to serve")
        return Signature(inputs=inputs, outputs=outputs)


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise BadInput(f"{path}: the file is empty")
    if size > PROTOBUF_BYTES_MAX:
        raise BadInput(_too_large(path, size))
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # has no stubs

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as exc:
        raise BadInput(f"{path}: not an ONNX model, or cut short: {first_line(exc)}") from exc
    if not model.graph.node and not model.graph.output:
        raise BadInput(f"{path}: not an ONNX model: it parses, but holds no graph")
    return model


def single_file(path: Path, into: Path) -> Path:
    """The model as one file: `path` itself, or, where its weights lie in files beside it (as MLflow saves larger
    tensors), a copy with the weights inside, in the folder `into`; the same model always gives the same bytes.

    Raises BadInput for what is no ONNX model, whose weights are not there, or larger than one file can hold.
    """
    model = _parsed(path)
    if _outside(model) is None:
        return path
    import onnx
    from google.protobuf.message import EncodeError

    whole = into / "whole.onnx"
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
        size = model.ByteSize()
        if size > PROTOBUF_BYTES_MAX:
            raise BadInput(_too_large(path, size))
        whole.write_bytes(model.SerializeToString(deterministic=True))
    except (onnx.checker.ValidationError, FileNotFoundError) as exc:
        raise BadInput(f"{path}: its weights lie in other files that cannot be read: {first_line(exc)}") from exc
    except (EncodeError, ValueError) as exc:
        raise BadInput(_too_large(path, None)) from exc
    return whole


def _too_large(path: Path, size: int | None) -> str:
    has = f" ({size / 2**30:.1f} GiB)" if size else ""
    return (
        f"{path}: with its weights{has} the model is larger than the 2 GiB that one ONNX file holds, and versions are "
        "verified and served as one file; make it smaller (float16 or int8 weights)"
    )


def _outside(model: Any) -> str | None:
    """The first file beside the model that holds weights of it; None if all are inside."""
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    for tensor in _get_all_tensors(model):
        if uses_external_data(tensor):
            return next((entry.value for entry in tensor.external_data if entry.key == "location"), "another file")
    return None


def _refuse_external_data(model: Any, path: Path) -> None:
    where = _outside(model)
    if where is not None:
        raise BadInput(
            f"{path}: keeps weights outside, in '{where}'. Versions are verified as one file of at most 2 GiB: "
            "save the model with its weights inside: onnx.save_model(model, path, save_as_external_data=False)"
        )


def _check(model: Any, path: Path) -> None:
    import onnx

    standard = all(entry.domain in _STANDARD_DOMAINS for entry in model.opset_import)
    try:
        onnx.checker.check_model(model, full_check=standard)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as exc:
        raise BadInput(f"{path}: not a sound ONNX model: {first_line(exc)}") from exc


def _check_versions(model: Any, path: Path) -> None:
    """ONNX Runtime has no call for what it supports, so it is handed an empty model stamped like this one."""
    from onnx import TensorProto, helper

    from serving.runtime import ort

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "versions",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    known = [entry for entry in model.opset_import if entry.domain in _STANDARD_DOMAINS]
    if not any(entry.domain in ("", "ai.onnx") for entry in known):
        known.append(helper.make_opsetid("", 13))
    stamped = helper.make_model(graph, opset_imports=known, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(stamped.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its errors share no base class; whatever it says, it cannot load this
        limit = re.search(r"(?:Current official support|max supported IR version).*", str(exc))
        reason = limit[0].rstrip(".") if limit else first_line(exc)
        opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
        raise BadInput(
            f"{path}: IR version {model.ir_version} and opset {opsets} are not what ONNX Runtime "
            f"{ort.__version__} loads; export the model for an older one ({reason})"
        ) from exc


def _tensor(value: Any, path: Path, side: str) -> Tensor:
    from onnx import TensorProto

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        zipmap = (
            "; if this is scikit-learn's ZipMap, convert with options={'zipmap': False}" if side == "output" else ""
        )
        raise BadInput(
            f"{path}: {side} '{value.name}' is a {(kind or 'nothing').removesuffix('_type')}, not a tensor{zipmap}"
        )
    body = value.type.tensor_type
    name = TensorProto.DataType.Name(body.elem_type)
    dtype = _OIP_OF.get(name)
    if dtype is None:
        raise BadInput(f"{path}: {side} '{value.name}' has the element type {name}, which the protocol cannot carry")
    if not body.HasField("shape"):
        # No shape at all: any rank. A row of one value per input is what the server can batch.
        return Tensor(value.name, dtype, (-1, -1))
    shape = tuple(d.dim_value if d.WhichOneof("value") == "dim_value" else -1 for d in body.shape.dim)
    return Tensor(value.name, dtype, shape)
