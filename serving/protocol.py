"""Requests and answers of the Open Inference Protocol v2: bytes in, tensors out, and back. No I/O.

JSON tensors and the binary tensor data extension (header `Inference-Header-Content-Length`) in both directions.
Every other form (`protocol_tfserving`, `protocol_mlflow`) makes the same `Call` of its own bytes.
Source: https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import orjson

from serving.errors import Malformed, OffContract
from serving.model import Feeds, Signature
from serving.tensors import Array, Tensor, from_bytes, from_json, from_text, to_bytes, to_json

JSON = b"application/json"
BINARY = b"application/octet-stream"
_FLAT = orjson.OPT_SERIALIZE_NUMPY
_DIMENSION_MAX = 2**40
_REMEMBERED_MAX = 128  # of each kind of frame around the numbers: clients send the same ones again and again
_HEAD_MAX = 4096  # bytes; longer ones are not remembered

Wanted = tuple[tuple[int, bool], ...]  # the outputs asked for, by position, each with whether raw bytes are


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer's body. `header_length`: how many of its bytes are JSON, where raw tensors follow."""

    body: bytes
    content_type: bytes = JSON
    header_length: int | None = None


@dataclass(slots=True)
class Call:
    """One inference that a client asks for, in no particular protocol.

    `id` is the client's own, or empty. `encode` turns the outputs (in the signature's order) into its answer.
    """

    id: str
    feeds: Feeds
    rows: int
    encode: Callable[[list[Array]], Reply]


@dataclass(frozen=True)
class Identity:
    """Who answers: the model and version as the clients know them, and the model's signature."""

    model: str
    version: str
    signature: Signature


def parse(body: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in `body`. Raises Malformed."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Malformed(f"the body is not JSON: {exc}") from None
    except RecursionError:
        raise Malformed("the body is nested too deeply") from None
    if type(value) is not dict:
        raise Malformed(f"the body must be a JSON object, not {_kind(value)}")
    return value


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the JSON head of a raw request came to: each input with its shape and its place in the `size` bytes.

    `plain`: the only input, its shape and number of elements, where its bytes are its values and any may stand there.
    """

    parts: tuple[tuple[Tensor, tuple[int, ...], int, int], ...]
    plain: tuple[Tensor, tuple[int, ...], int] | None
    size: int
    rows: int
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class _Form:
    """What a JSON request with one flat input came to, the numbers taken out; `tail` is what stands after them."""

    spec: Tensor
    shape: tuple[int, ...]
    tail: bytes
    rows: int
    wanted: Wanted


class InferenceProtocol:
    """The codec for one model. Made once; holds what does not change from request to request."""

    def __init__(self, who: Identity) -> None:
        self._who = who
        self._inputs = {spec.name: spec for spec in who.signature.inputs}
        self._outputs = {spec.name: at for at, spec in enumerate(who.signature.outputs)}
        self._described = [
            b'{"name":%b,"datatype":"%b","shape":' % (orjson.dumps(spec.name), spec.datatype.name.encode())
            for spec in who.signature.outputs
        ]
        self._opening = orjson.dumps({"model_name": who.model, "model_version": who.version})[:-1]
        self._plans: dict[bytes, _Plan] = {}
        self._forms: dict[bytes, _Form] = {}
        self._frames: dict[tuple[Any, ...], list[bytes]] = {}
        self._all: Wanted = tuple((at, False) for at in range(len(self._described)))

    def decode(self, body: bytes, header_length: int | None = None) -> Call:
        """The call that `body` asks for; with `header_length`, raw tensors follow after that many bytes of JSON.

        Raises Malformed or OffContract.
        """
        if header_length is None:
            return self._decode_text(body)
        if not 0 <= header_length <= len(body):
            raise Malformed(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
        head = body[:header_length]
        plan = self._plans.get(head)
        if plan is not None and plan.plain is not None and len(body) == header_length + plan.size:
            spec, shape, count = plan.plain
            values = np.frombuffer(body, spec.datatype.numpy, count, header_length).reshape(shape)
            return Call("", {spec.name: values}, plan.rows, lambda outputs: self._encode("", plan.wanted, outputs))
        raw = memoryview(body)[header_length:]
        if plan is not None and len(raw) == plan.size:
            feeds = {spec.name: from_bytes(spec, shape, raw[start:end]) for spec, shape, start, end in plan.parts}
            return Call("", feeds, plan.rows, lambda outputs: self._encode("", plan.wanted, outputs))
        asked = parse(head)
        call = self._decode(asked, raw)
        self._remember_plan(head, asked, len(raw), call.rows)
        return call

    def _decode_text(self, body: bytes) -> Call:
        """As `decode`, for JSON alone. If only the numbers differ from an earlier request, only they are read."""
        start = body.find(b"[", body.find(b'"data"', 0, _HEAD_MAX) + 6)
        form = self._forms.get(body[:start])
        if form is not None and body.endswith(form.tail):
            values = from_text(form.spec, form.shape, body[start : len(body) - len(form.tail)])
            if values is not None:
                wanted = form.wanted
                return Call("", {form.spec.name: values}, form.rows, lambda outputs: self._encode("", wanted, outputs))
        asked = parse(body)
        call = self._decode(asked, memoryview(b""))
        if form is None:
            self._remember_form(body, start, asked, call)
        return call

    def _remember_form(self, body: bytes, start: int, asked: dict[str, Any], call: Call) -> None:
        """Keeps what stands around the numbers of this request, if they are all that will differ in the next one.

        The proof that the list at `start` is the input's data: without its numbers, the body says the same less them.
        """
        stop = body.rfind(b"]", start, body.find(b"]", start) + 1)
        tail = body[stop + 1 :]
        inputs = asked["inputs"]
        if "id" in asked or len(inputs) != 1 or start + len(tail) > _HEAD_MAX or stop < 0:
            return
        try:
            emptied = orjson.loads(body[:start] + b"[]" + tail)
        except orjson.JSONDecodeError:
            return
        if emptied != {**asked, "inputs": [{**inputs[0], "data": []}]}:
            return
        spec = self._inputs[inputs[0]["name"]]
        if len(self._forms) >= _REMEMBERED_MAX:
            self._forms.clear()
        self._forms[body[:start]] = _Form(spec, tuple(inputs[0]["shape"]), tail, call.rows, self._wanted(asked))

    def _remember_plan(self, head: bytes, asked: Mapping[str, Any], size: int, rows: int) -> None:
        """Keeps what `head` came to, if all its tensors are raw and it has no id: then it will come again."""
        if "id" in asked or len(head) > _HEAD_MAX:
            return
        parts, start = [], 0
        for tensor in asked["inputs"]:
            length = _parameters(tensor).get("binary_data_size")
            if length is None:
                return
            parts.append((self._inputs[tensor["name"]], tuple(tensor["shape"]), start, start + length))
            start += length
        if len(self._plans) >= _REMEMBERED_MAX:
            self._plans.clear()
        plain = None
        if len(parts) == 1 and size:
            spec, shape = parts[0][:2]
            if spec.datatype.name not in ("BOOL", "BYTES") and not spec.finite:
                plain = (spec, shape, prod(shape))
        self._plans[head] = _Plan(tuple(parts), plain, size, rows, self._wanted(asked))

    def _decode(self, asked: Mapping[str, Any], raw: memoryview) -> Call:
        call_id = asked.get("id", "")
        if type(call_id) is not str:
            raise Malformed(f"'id' must be a string, not {_kind(call_id)}")
        feeds = self._feeds(asked.get("inputs"), raw)
        wanted = self._wanted(asked)
        rows = self._who.signature.rows(feeds)
        return Call(call_id, feeds, rows, lambda outputs: self._encode(call_id, wanted, outputs))

    def error(self, message: str) -> bytes:
        """The body of an answer that says no."""
        return orjson.dumps({"error": message})

    def _feeds(self, inputs: object, raw: memoryview) -> Feeds:
        if type(inputs) is not list:
            raise Malformed(f"'inputs' must be a list of tensors, not {_kind(inputs)}")
        feeds: Feeds = {}
        for tensor in inputs:
            if type(tensor) is not dict:
                raise Malformed(f"an input must be an object, not {_kind(tensor)}")
            name = tensor.get("name")
            spec = self._inputs.get(name) if type(name) is str else None
            if spec is None:
                raise OffContract(str(name)[:100], f"one of {', '.join(self._inputs)}", "this name")
            if spec.name in feeds:
                raise spec.refuse("to be given once", "it twice")
            feeds[spec.name], raw = _input(spec, tensor, raw)
        if len(feeds) != len(self._inputs):
            missing = next(spec for name, spec in self._inputs.items() if name not in feeds)
            raise missing.refuse(f"{missing.datatype.name} of shape {missing.wire_shape}", "nothing: it is missing")
        if len(raw):
            raise Malformed(f"{len(raw)} bytes of tensor data belong to no input")
        return feeds

    def _wanted(self, asked: Mapping[str, Any]) -> Wanted:
        parameters = _parameters(asked)
        binary = parameters.get("binary_data_output", False) is True
        outputs = asked.get("outputs")
        if not outputs:
            return tuple((at, True) for at, _ in self._all) if binary else self._all
        if type(outputs) is not list:
            raise Malformed(f"'outputs' must be a list, not {_kind(outputs)}")
        wanted = []
        for output in outputs:
            name = output.get("name") if type(output) is dict else None
            at = self._outputs.get(name) if type(name) is str else None
            if at is None:
                raise Malformed(f"output '{str(name)[:100]}' is not one of {', '.join(self._outputs)}")
            details = _parameters(output)
            if "classification" in details or "shared_memory_region" in details:
                raise Malformed(f"output '{name}': classification and shared memory are not offered here")
            wanted.append((at, details.get("binary_data", binary) is True))
        if len(wanted) > len({at for at, _ in wanted}):
            raise Malformed("an output is asked for twice")
        return tuple(wanted)

    def _encode(self, call_id: str, wanted: Wanted, outputs: list[Array]) -> Reply:
        texts: list[bytes] = []
        raws: list[bytes] = []
        sizes: list[Any] = []
        for at, binary in wanted:
            values = outputs[at]
            if binary:
                raw = to_bytes(values)
                raws.append(raw)
                sizes.append((values.shape, len(raw)))
            else:
                texts.append(orjson.dumps(to_json(values.reshape(-1)), option=_FLAT))
                sizes.append(values.shape)
        key = (wanted, *sizes)
        frame = self._frames.get(key)
        if frame is None:
            frame = self._remember_frame(key, wanted, sizes)
        parts = [self._opening, frame[0]]
        if call_id:
            parts.insert(1, b',"id":' + orjson.dumps(call_id))
        for text, piece in zip(texts, frame[1:], strict=True):
            parts += (text, piece)
        head = b"".join(parts)
        if not raws:
            return Reply(head)
        return Reply(b"".join((head, *raws)), BINARY, len(head))

    def _remember_frame(self, key: tuple[Any, ...], wanted: Wanted, sizes: Sequence[Any]) -> list[bytes]:
        """What stands in an answer before, between and after the JSON data of its tensors."""
        pieces, piece = [], b',"outputs":['
        for (at, binary), size in zip(wanted, sizes, strict=True):
            piece += self._described[at]
            if binary:
                shape, length = size
                piece += b'%b,"parameters":{"binary_data_size":%d}},' % (orjson.dumps(shape), length)
            else:
                pieces.append(piece + orjson.dumps(size) + b',"data":')
                piece = b"},"
        pieces.append(piece.removesuffix(b",") + b"]}")
        if len(self._frames) >= _REMEMBERED_MAX:
            self._frames.clear()
        self._frames[key] = pieces
        return pieces


def _input(spec: Tensor, tensor: Mapping[str, Any], raw: memoryview) -> tuple[Array, memoryview]:
    """One input's values, and what is left of the raw bytes after it."""
    if tensor.get("datatype") != spec.datatype.name:
        raise spec.refuse(f"datatype {spec.datatype.name}", tensor.get("datatype"))
    shape = tensor.get("shape")
    if type(shape) is not list or not all(type(length) is int and 0 <= length < _DIMENSION_MAX for length in shape):
        raise spec.refuse("a shape: a list of lengths", shape)
    spec.check_shape(shape)
    if "parameters" not in tensor:
        return from_json(spec, shape, tensor.get("data")), raw
    parameters = _parameters(tensor)
    if "shared_memory_region" in parameters:
        raise spec.refuse("its data in the request", "a shared memory region, which is not offered here")
    size = parameters.get("binary_data_size")
    if size is None:
        return from_json(spec, shape, tensor.get("data")), raw
    if type(size) is not int or not 0 <= size <= len(raw):
        raise spec.refuse(f"a binary_data_size of at most the {len(raw)} bytes left", size)
    return from_bytes(spec, shape, raw[:size]), raw[size:]


def _parameters(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = holder.get("parameters") or {}
    if type(parameters) is not dict:
        raise Malformed(f"'parameters' must be an object, not {_kind(parameters)}")
    return parameters


def _kind(value: object) -> str:
    """What JSON calls a value of this type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
