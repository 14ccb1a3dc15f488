"""TensorFlow Serving's REST form of a prediction, which is KServe's first protocol too. No I/O.

Row form: `{"instances": [...]}` -> `{"predictions": [...]}`; column form: `{"inputs": ...}` -> `{"outputs": ...}`.
A model with one input takes bare values, one with several takes objects by input name; the same for outputs.
Shapes and types are not in the request: the type is the signature's, the shape that of the nested lists.
Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import orjson

from serving.errors import Malformed, ModelFailed
from serving.model import Feeds
from serving.protocol import Call, Identity, Reply, parse
from serving.tensors import Array, Tensor, from_json, to_json

_TYPES = {
    "BOOL": "DT_BOOL",
    "FP16": "DT_HALF",
    "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE",
    "BYTES": "DT_STRING",
}
_DEPTH_MAX = 32


class TfServingProtocol:
    """The codec for one model."""

    def __init__(self, who: Identity) -> None:
        self._who = who
        self._inputs = who.signature.inputs

    def decode(self, body: bytes, header_length: int | None = None) -> Call:
        """The call that `body` asks for. Raises Malformed or OffContract."""
        if header_length is not None:
            raise Malformed("binary tensors belong to the /v2 protocol")
        return self.decode_object(parse(body))

    def decode_object(self, asked: dict[str, Any]) -> Call:
        """As `decode`, for a body that is parsed already."""
        if ("instances" in asked) == ("inputs" in asked):
            raise Malformed("the body must have either 'instances' (rows) or 'inputs' (columns)")
        by_row = "instances" in asked
        feeds = self.rows_of(asked["instances"]) if by_row else self.columns_of(asked["inputs"])
        rows = self._who.signature.rows(feeds)
        if by_row:
            return Call("", feeds, rows, lambda outputs: Reply(_dump({"predictions": self.as_rows(outputs, rows)})))
        return Call("", feeds, rows, lambda outputs: Reply(_dump({"outputs": self.as_columns(outputs)})))

    def error(self, message: str) -> bytes:
        """The body of an answer that says no."""
        return orjson.dumps({"error": message})

    def rows_of(self, instances: object) -> Feeds:
        """The inputs of the row form."""
        if type(instances) is not list or not instances:
            raise Malformed("'instances' must be a list of at least one row")
        if type(instances[0]) is not dict or "b64" in instances[0]:
            return {self._only().name: tensor_of(self._only(), instances)}
        columns: dict[str, list[Any]] = {name: [] for name in instances[0]}
        for at, row in enumerate(instances):
            if type(row) is not dict or row.keys() != columns.keys():
                raise Malformed(f"row {at} of 'instances' must be an object with the keys {', '.join(columns)}")
            for name, value in row.items():
                columns[name].append(value)
        return self.columns_of(columns)

    def columns_of(self, inputs: object) -> Feeds:
        """The inputs of the column form."""
        if type(inputs) is not dict or "b64" in inputs:
            return {self._only().name: tensor_of(self._only(), inputs)}
        known = {spec.name for spec in self._inputs}
        for name in inputs:
            if name not in known:
                raise Malformed(f"input '{name[:100]}' is not one of {', '.join(sorted(known))}")
        feeds = {}
        for spec in self._inputs:
            if spec.name not in inputs:
                raise spec.refuse(f"{spec.datatype.name} of shape {spec.wire_shape}", "nothing: it is missing")
            feeds[spec.name] = tensor_of(spec, inputs[spec.name])
        return feeds

    def as_rows(self, outputs: Sequence[Array], rows: int) -> Any:
        """The outputs row by row, as orjson writes them. Raises ModelFailed when they have no rows."""
        if any(not values.ndim or values.shape[0] != rows for values in outputs):
            raise ModelFailed("the model's outputs have no rows; ask in the column form ('inputs')")
        columns = [to_json(values) for values in outputs]
        if len(columns) == 1:
            return columns[0]
        names = [spec.name for spec in self._who.signature.outputs]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def as_columns(self, outputs: Sequence[Array]) -> Any:
        """The outputs by name, or bare if there is only one."""
        if len(outputs) == 1:
            return to_json(outputs[0])
        names = (spec.name for spec in self._who.signature.outputs)
        return {name: to_json(values) for name, values in zip(names, outputs, strict=True)}

    def metadata(self) -> dict[str, Any]:
        """What `GET /v1/models/{model}/metadata` answers."""
        signature = {
            "inputs": {spec.name: _described(spec) for spec in self._inputs},
            "outputs": {spec.name: _described(spec) for spec in self._who.signature.outputs},
            "method_name": "tensorflow/serving/predict",
        }
        return {
            "model_spec": {"name": self._who.model, "signature_name": "", "version": self._who.version},
            "metadata": {"signature_def": {"signature_def": {"serving_default": signature}}},
        }

    def _only(self) -> Tensor:
        if len(self._inputs) != 1:
            names = ", ".join(spec.name for spec in self._inputs)
            raise Malformed(f"the model has the inputs {names}; give each by its name")
        return self._inputs[0]


def tensor_of(spec: Tensor, data: object) -> Array:
    """Nested lists as the input `spec`, whose shape they must have. One number per row may stand for a list of one."""
    shape: list[int] = []
    first = data
    while type(first) is list and len(shape) < _DEPTH_MAX:
        shape.append(len(first))
        if not first:
            break
        first = first[0]
    if len(shape) == len(spec.shape) - 1 and spec.shape[-1] in (1, None):
        shape.append(1)
    spec.check_shape(shape)
    if spec.datatype.name == "BYTES":
        data = _unpacked(spec, data, len(shape))
    return from_json(spec, shape, data if shape else [data])


def _unpacked(spec: Tensor, data: Any, depth: int) -> Any:
    """`{"b64": ...}` as the string that it stands for."""
    if type(data) is list and depth >= 0:
        return [_unpacked(spec, value, depth - 1) for value in data]
    if type(data) is dict and type(data.get("b64")) is str and len(data) == 1:
        try:
            return base64.b64decode(data["b64"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise spec.refuse("base64 of a string in UTF-8", f"{data!r}: {exc}") from None
    return data


def _described(spec: Tensor) -> dict[str, Any]:
    name = spec.datatype.name
    dims = [{"size": str(length), "name": ""} for length in spec.wire_shape]
    shape = {"dim": dims, "unknown_rank": False}
    return {"name": spec.name, "dtype": _TYPES.get(name, f"DT_{name}"), "tensor_shape": shape}


def _dump(answer: Any) -> bytes:
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
