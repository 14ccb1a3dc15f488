"""The server's own description: an OpenAPI 3.1 document made of the model's signature. A pure function."""

from __future__ import annotations

from typing import Any

from serving.protocol import Identity
from serving.tensors import DATATYPES, Tensor

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_WORDS = {
    400: "The request is not what the protocol or the model's signature says.",
    408: "The request did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "The queue is full.",
    500: "The model failed on this request.",
    503: "The deadline passed in the queue, or the server is not ready.",
}


def document(who: Identity) -> Schema:
    """The OpenAPI document of the server of `who`."""
    error = _object({"error": _STRING}, "error")
    mlflow_error = _object({"error_code": _STRING, "message": _STRING}, "error_code", "message")
    base_v1, base_v2 = f"/v1/models/{who.model}", f"/v2/models/{who.model}"
    paths: Schema = {
        "/metrics": {"get": _read("The counters, as Prometheus text.", None)},
        "/openapi.json": {"get": _read("This document.", _OBJECT)},
        "/v2": {
            "get": _read("The server.", _object({"name": _STRING, "version": _STRING, "extensions": _list(_STRING)}))
        },
        "/v2/health/live": {"get": _read("Whether the process answers.", _flag("live"))},
        "/v2/health/ready": {"get": _read("Whether requests are welcome.", _flag("ready"), 503)},
        "/ping": {"get": _read("Whether requests are welcome, as MLflow asks.", _flag("ready"), 503)},
        "/health": {"get": _read("As /ping.", _flag("ready"), 503)},
        "/invocations": {"post": _predict("MLflow's scoring protocol.", _mlflow(), _only("predictions"), mlflow_error)},
    }
    for version in ("", f"/versions/{who.version}"):
        v1, v2 = base_v1 + version, base_v2 + version
        paths[v1] = {"get": _read("The model's status, as TensorFlow Serving and KServe say it.", _OBJECT, 503)}
        paths[v1 + "/metadata"] = {"get": _read("The signature, as TensorFlow Serving says it.", _OBJECT)}
        answer = {"oneOf": [_only("predictions"), _only("outputs")]}
        paths[v1 + ":predict"] = {"post": _predict("TensorFlow Serving's prediction.", _tf(), answer, error)}
        paths[v2] = {"get": _read("The signature.", _metadata())}
        paths[v2 + "/ready"] = {"get": _read("Whether requests are welcome.", _flag("ready"), 503)}
        paths[v2 + "/stats"] = {"get": _read("Triton's statistics.", _only("model_stats"))}
        paths[v2 + "/infer"] = {"post": _predict("The Open Inference Protocol.", _infer(who), _inferred(), error)}
    title = f"{who.model}, version {who.version}"
    return {"openapi": "3.1.0", "info": {"title": title, "version": who.version}, "paths": paths}


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(of: Schema, **more: int) -> Schema:
    return {"type": "array", "items": of, **more}


def _only(name: str) -> Schema:
    return _object({name: {}}, name)


def _flag(name: str) -> Schema:
    return _object({name: {"type": "boolean"}}, name)


def _answer(says: str, schema: Schema | None) -> Schema:
    content = {"text/plain": {"schema": _STRING}} if schema is None else {"application/json": {"schema": schema}}
    return {"description": says, "content": content}


def _read(says: str, schema: Schema | None, *more: int) -> Schema:
    answers = {"200": _answer(says, schema)}
    answers |= {str(status): _answer(_WORDS[status], schema) for status in more}
    return {"summary": says, "responses": answers}


def _predict(says: str, body: Schema, answer: Schema, error: Schema) -> Schema:
    responses = {"200": _answer("The prediction.", answer)}
    responses |= {str(status): _answer(text, error) for status, text in _WORDS.items()}
    return {
        "summary": says,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": responses,
    }


def _metadata() -> Schema:
    tensor = _object(
        {"name": _STRING, "datatype": _datatype(), "shape": _list({"type": "integer"})}, "name", "datatype"
    )
    tensors = {"inputs": _list(tensor), "outputs": _list(tensor)}
    return _object({"name": _STRING, "versions": _list(_STRING), "platform": _STRING, **tensors}, "name", *tensors)


def _datatype() -> Schema:
    return {"enum": [datatype.name for datatype in DATATYPES]}


def _infer(who: Identity) -> Schema:
    inputs = [_input(spec) for spec in who.signature.inputs]
    outputs = _list(_object({"name": {"enum": [spec.name for spec in who.signature.outputs]}}, "name"))
    count = len(inputs)
    tensors = _list({"oneOf": inputs} if count > 1 else inputs[0] if inputs else {}, minItems=count, maxItems=count)
    return _object({"id": _STRING, "parameters": _OBJECT, "inputs": tensors, "outputs": outputs}, "inputs")


def _input(spec: Tensor) -> Schema:
    lengths = [{"const": length} if length >= 0 else {"type": "integer", "minimum": 0} for length in spec.wire_shape]
    rank = len(lengths)
    shape = {"type": "array", "prefixItems": lengths, "minItems": rank, "maxItems": rank}
    fixed = {"name": {"const": spec.name}, "datatype": {"const": spec.datatype.name}, "shape": shape}
    return _object({**fixed, "data": {"type": "array"}}, *fixed)


def _inferred() -> Schema:
    tensor = _object(
        {"name": _STRING, "datatype": _datatype(), "shape": _list({"type": "integer"})}, "name", "datatype"
    )
    outputs = {"outputs": _list(tensor)}
    return _object({"model_name": _STRING, "model_version": _STRING, "id": _STRING, **outputs}, "model_name", "outputs")


def _tf() -> Schema:
    return {"type": "object", "oneOf": [_only("instances"), _only("inputs")]}


def _mlflow() -> Schema:
    forms = ("dataframe_split", "dataframe_records", "instances", "inputs")
    return {"type": "object", "oneOf": [_only(form) for form in forms]}
