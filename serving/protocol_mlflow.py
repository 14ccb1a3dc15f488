"""MLflow's scoring protocol (`/invocations`), JSON forms. No I/O.

`dataframe_split` and `dataframe_records` are tables: columns named like the model's inputs feed them one by one;
otherwise the columns, in their order, are the one two-dimensional input. They are answered with one record per row, as
MLflow's own ONNX flavour answers. `instances` and `inputs` are TensorFlow Serving's forms.
Source: https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally
"""

from __future__ import annotations

from typing import Any

import orjson

from serving.errors import Malformed
from serving.model import Feeds
from serving.protocol import Call, Identity, Reply, parse
from serving.protocol_tfserving import TfServingProtocol, tensor_of
from serving.tensors import Array

_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")


class MlflowProtocol:
    """The codec for one model."""

    def __init__(self, who: Identity) -> None:
        self._who = who
        self._tensors = TfServingProtocol(who)
        self._outputs = [spec.name for spec in who.signature.outputs]

    def decode(self, body: bytes, header_length: int | None = None) -> Call:
        """The call that `body` asks for. Raises Malformed or OffContract."""
        if header_length is not None:
            raise Malformed("binary tensors belong to the /v2 protocol")
        asked = parse(body)
        forms = [form for form in _FORMS if form in asked]
        if len(forms) != 1:
            raise Malformed(
                f"the body must have exactly one of {', '.join(_FORMS)}; it has {', '.join(forms) or 'none'}"
            )
        form, data = forms[0], asked[forms[0]]
        if form == "instances":
            feeds = self._tensors.rows_of(data)
        elif form == "inputs":
            feeds = self._tensors.columns_of(data)
        else:
            feeds = self._table(*(_split(data) if form == "dataframe_split" else _records(data)))
        rows = self._who.signature.rows(feeds)
        if form == "inputs":
            return Call("", feeds, rows, lambda outputs: _reply(self._tensors.as_columns(outputs)))
        if form == "instances":
            return Call("", feeds, rows, lambda outputs: _reply(self._tensors.as_rows(outputs, rows)))
        return Call("", feeds, rows, lambda outputs: _reply(self._as_records(outputs, rows)))

    def error(self, message: str) -> bytes:
        """The body of an answer that says no."""
        return orjson.dumps({"error_code": "BAD_REQUEST", "message": message})

    def _table(self, columns: list[str], data: list[list[Any]]) -> Feeds:
        inputs = self._who.signature.inputs
        if set(columns) == {spec.name for spec in inputs}:
            at = {name: columns.index(name) for name in columns}
            return {spec.name: tensor_of(spec, [row[at[spec.name]] for row in data]) for spec in inputs}
        if len(inputs) != 1 or len(inputs[0].shape) != 2:
            names = ", ".join(spec.name for spec in inputs)
            raise Malformed(f"the columns must be named like the model's inputs: {names}")
        return {inputs[0].name: tensor_of(inputs[0], data)}

    def _as_records(self, outputs: list[Array], rows: int) -> list[Any]:
        cells = [values.reshape(rows) if values.size == rows else values for values in outputs]
        listed = self._tensors.as_rows(cells, rows)
        return listed if len(cells) > 1 else [{self._outputs[0]: value} for value in listed]


def _split(data: object) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of `{"columns": [...], "data": [[...], ...]}`."""
    if type(data) is not dict or type(data.get("data")) is not list or not data["data"]:
        raise Malformed("'dataframe_split' must be an object with 'columns' and 'data', a list of at least one row")
    rows = data["data"]
    first = rows[0] if type(rows[0]) is list else []
    columns = data.get("columns", list(map(str, range(len(first)))))
    if type(columns) is not list or len(set(map(str, columns))) != len(columns):
        raise Malformed("'columns' of 'dataframe_split' must be a list of different names")
    for at, row in enumerate(rows):
        if type(row) is not list or len(row) != len(columns):
            raise Malformed(f"row {at} of 'dataframe_split' must be a list of {len(columns)} values, one per column")
    return [str(name) for name in columns], rows


def _records(data: object) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of `[{column: value, ...}, ...]`."""
    if type(data) is not list or not data or type(data[0]) is not dict:
        raise Malformed("'dataframe_records' must be a list of at least one object")
    columns = list(data[0])
    rows = []
    for at, record in enumerate(data):
        if type(record) is not dict or record.keys() != data[0].keys():
            raise Malformed(f"row {at} of 'dataframe_records' must have the columns {', '.join(columns)[:200]}")
        rows.append([record[name] for name in columns])
    return columns, rows


def _reply(predictions: Any) -> Reply:
    return Reply(orjson.dumps({"predictions": predictions}, option=orjson.OPT_SERIALIZE_NUMPY))
