"""Tensors and their three spellings: ONNX Runtime's types, the protocol's datatypes, and JSON or raw bytes.

Datatypes and the raw layout (row-major, little-endian, BYTES elements preceded by a 4-byte length) are those of the
Open Inference Protocol v2 and its binary tensor data extension.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

from serving.errors import OffContract

Array = NDArray[Any]

_ELEMENTS_MAX = 2**40  # a product of dimensions beyond this is nonsense, and must not become an allocation
_TEXT_MAX = 2**20  # bytes; the reader's buffers grow with what it reads, and stay
_READER = simdjson.Parser()


@dataclass(frozen=True, slots=True)
class Datatype:
    """`name` in the protocol, `onnx` in ONNX Runtime, and the type code of `struct` and `array`, if it has one."""

    name: str
    onnx: str
    numpy: np.dtype[Any]
    code: str = ""


DATATYPES: tuple[Datatype, ...] = (
    Datatype("BOOL", "tensor(bool)", np.dtype(np.bool_)),
    Datatype("UINT8", "tensor(uint8)", np.dtype(np.uint8), "B"),
    Datatype("UINT16", "tensor(uint16)", np.dtype("<u2"), "H"),
    Datatype("UINT32", "tensor(uint32)", np.dtype("<u4"), "I"),
    Datatype("UINT64", "tensor(uint64)", np.dtype("<u8"), "Q"),
    Datatype("INT8", "tensor(int8)", np.dtype(np.int8), "b"),
    Datatype("INT16", "tensor(int16)", np.dtype("<i2"), "h"),
    Datatype("INT32", "tensor(int32)", np.dtype("<i4"), "i"),
    Datatype("INT64", "tensor(int64)", np.dtype("<i8"), "q"),
    Datatype("FP16", "tensor(float16)", np.dtype("<f2"), "f"),
    Datatype("FP32", "tensor(float)", np.dtype("<f4"), "f"),
    Datatype("FP64", "tensor(double)", np.dtype("<f8"), "d"),
    Datatype("BYTES", "tensor(string)", np.dtype(object)),
)
BY_ONNX = {datatype.onnx: datatype for datatype in DATATYPES}
BY_NAME = {datatype.name: datatype for datatype in DATATYPES}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a model. A dimension is a length, a name (free, equal wherever it recurs) or None (free).

    `finite`: NaN and infinities are refused.
    """

    name: str
    datatype: Datatype
    shape: tuple[int | str | None, ...]
    finite: bool = False

    @property
    def wire_shape(self) -> list[int]:
        """The shape as the protocol writes it: -1 where the length is free."""
        return [length if isinstance(length, int) else -1 for length in self.shape]

    def refuse(self, expected: str, got: object) -> OffContract:
        """The error that says so; `got` is cut short."""
        text = got if isinstance(got, str) else repr(got)
        return OffContract(self.name, expected, text if len(text) <= 120 else text[:117] + "...")

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises OffContract unless `shape` is one that this tensor may have."""
        expected = self.shape
        if len(shape) != len(expected) or any(
            length != wanted and (isinstance(wanted, int) or length < 0)
            for length, wanted in zip(shape, expected, strict=True)
        ):
            raise self.refuse(f"shape {self.wire_shape}", f"shape {list(shape)}")

    def check_values(self, values: Array) -> None:
        """Raises OffContract for a NaN or infinity where the contract forbids them."""
        if self.finite and values.dtype.kind == "f" and not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise self.refuse("finite numbers", f"{values.reshape(-1)[at]} at element {at}")


def from_json(spec: Tensor, shape: Sequence[int], data: object) -> Array:
    """JSON `data`, flat or nested as `shape` says, as an array. Raises OffContract."""
    if not isinstance(data, list):
        raise spec.refuse("a list of values", data)
    flat = _flatten(spec, shape, data)
    if len(flat) != prod(shape):
        raise spec.refuse(f"{prod(shape)} values for shape {list(shape)}", f"{len(flat)} values")
    values = _numbers(spec, flat) if spec.datatype.code else _others(spec, flat)
    values = values.reshape(shape)
    spec.check_values(values)
    return values


def from_text(spec: Tensor, shape: Sequence[int], text: bytes) -> Array | None:
    """The JSON list of numbers `text` as an array, in a third of the time that `from_json` and its parser take.

    None for anything else than a flat list of as many plain numbers as `shape` holds. Raises OffContract.
    """
    # Halves are rounded twice by the parser's way, by way of single precision; here they would be rounded once.
    if spec.datatype.numpy.kind != "f" or spec.datatype.numpy.itemsize < 4 or len(text) > _TEXT_MAX or b"[" in text[1:]:
        return None
    try:
        read: Any = _READER.parse(text)
        flat = np.frombuffer(read.as_buffer(of_type="d"))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # each is a way to say: not a list of numbers
        return None
    if len(flat) != prod(shape):
        return None
    values = _narrowed(flat, spec.datatype.numpy).reshape(shape)
    spec.check_values(values)
    return values


def _flatten(spec: Tensor, shape: Sequence[int], data: list[Any]) -> list[Any]:
    """Nested lists made flat, one level at a time; a level that is not as long as the shape says is ragged."""
    if not data or type(data[0]) is not list:
        return data
    if not shape:
        raise spec.refuse("one value", data)
    if len(data) != shape[0]:
        raise spec.refuse(f"{shape[0]} rows for shape {list(shape)}", f"{len(data)} rows")
    level = data
    for axis, length in enumerate(shape[1:], start=1):
        if type(level[0]) is not list:
            break
        for at, row in enumerate(level):
            if type(row) is not list:
                raise spec.refuse(f"a list of {length} values at row {at} (axis {axis})", row)
            if len(row) != length:
                raise spec.refuse(f"{length} values in every row (axis {axis})", f"{len(row)} in row {at}")
        level = list(chain.from_iterable(level))
        if not level:
            break
    return level


def _numbers(spec: Tensor, flat: list[Any]) -> Array:
    datatype = spec.datatype
    try:
        # struct is twice as fast as numpy here, and stricter: no fraction, string or list becomes an integer.
        packed = struct.pack(f"<{len(flat)}{datatype.code}", *flat)
    except (struct.error, OverflowError, TypeError):
        packed = array(datatype.code, _mended(spec, flat)).tobytes()
    if datatype.name == "FP16":
        return _narrowed(np.frombuffer(packed, dtype="<f4"), datatype.numpy)
    return np.frombuffer(packed, dtype=datatype.numpy)


def _narrowed(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):  # beyond the type's range is an infinity, as in any other cast to it
        return values.astype(dtype)


def _mended(spec: Tensor, flat: list[Any]) -> list[Any]:
    """The slow path: null becomes NaN where the type has it; anything else that does not fit is named."""
    floating = spec.datatype.numpy.kind == "f"
    mended: list[Any] = []
    for at, value in enumerate(flat):
        if floating and value is None:
            mended.append(float("nan"))
        elif (isinstance(value, (int, float)) and floating) or (isinstance(value, int) and _in_range(spec, value)):
            mended.append(value)
        else:
            raise spec.refuse(f"{spec.datatype.name} values", f"{value!r} at element {at}")
    return mended


def _in_range(spec: Tensor, value: int) -> bool:
    limits = np.iinfo(spec.datatype.numpy)
    return int(limits.min) <= value <= int(limits.max)


def _others(spec: Tensor, flat: list[Any]) -> Array:
    if spec.datatype.name == "BOOL":
        for at, value in enumerate(flat):
            if type(value) is not bool and value not in (0, 1):
                raise spec.refuse("true or false", f"{value!r} at element {at}")
        return np.array(flat, dtype=np.bool_)
    for at, value in enumerate(flat):
        if type(value) is not str:
            raise spec.refuse("strings", f"{value!r} at element {at}")
    values = np.empty(len(flat), dtype=object)
    values[:] = flat
    return values


def from_bytes(spec: Tensor, shape: Sequence[int], raw: memoryview) -> Array:
    """Raw `raw` bytes as an array (a view on them, but for BYTES). Raises OffContract."""
    count = prod(shape)
    if count > _ELEMENTS_MAX:
        raise spec.refuse("a shape of sensible size", list(shape))
    if spec.datatype.name == "BYTES":
        return _strings(spec, count, raw).reshape(shape)
    size = count * spec.datatype.numpy.itemsize
    if len(raw) != size:
        raise spec.refuse(f"{size} bytes for {spec.datatype.name} of shape {list(shape)}", f"{len(raw)} bytes")
    values = np.frombuffer(raw, dtype=spec.datatype.numpy).reshape(shape)
    if spec.datatype.name == "BOOL":
        values = values.view(np.uint8) != 0  # any other byte than 0 and 1 would be undefined behaviour in the model
    spec.check_values(values)
    return values


def _strings(spec: Tensor, count: int, raw: memoryview) -> Array:
    if count * 4 > len(raw):
        raise spec.refuse(f"{count} strings, each after its 4-byte length", f"{len(raw)} bytes")
    values = np.empty(count, dtype=object)
    at = 0
    for index in range(count):
        if at + 4 > len(raw):
            raise spec.refuse(f"{count} strings", f"an end after {index}")
        (length,) = struct.unpack_from("<I", raw, at)
        text = raw[at + 4 : at + 4 + length]
        if len(text) != length:
            raise spec.refuse(f"{length} bytes in string {index}", f"{len(text)}")
        try:
            values[index] = str(text, "utf-8")
        except UnicodeDecodeError:
            raise spec.refuse("strings in UTF-8", f"other bytes in string {index}") from None
        at += 4 + length
    if at != len(raw):
        raise spec.refuse(f"{count} strings and nothing more", f"{len(raw) - at} bytes after them")
    return values


def to_bytes(values: Array) -> bytes:
    """The array's raw bytes in the protocol's layout."""
    if values.dtype.kind != "O":
        return values.tobytes()
    parts = []
    for value in values.reshape(-1).tolist():
        text = value.encode() if isinstance(value, str) else bytes(value)
        parts.append(struct.pack("<I", len(text)))
        parts.append(text)
    return b"".join(parts)


def to_json(values: Array) -> Any:
    """The array as something that orjson writes: a contiguous array, or a list."""
    kind = values.dtype.kind
    if kind == "O":
        return values.tolist()
    if kind == "f" and values.itemsize == 2:
        values = values.astype(np.float32)
    if values.dtype.char in "qQ":  # ONNX Runtime's 64-bit integers: C's long long, whose scalars orjson does not know
        values = values.view(np.int64 if kind == "i" else np.uint64)
    return np.ascontiguousarray(values)
