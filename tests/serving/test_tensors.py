"""Tensors: every datatype survives both spellings, and what does not fit is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.errors import OffContract
from serving.tensors import BY_NAME, DATATYPES, Tensor, from_bytes, from_json, from_text, to_bytes, to_json


def spec(name: str, *shape: int | str | None, finite: bool = False) -> Tensor:
    return Tensor("x", BY_NAME[name], shape or (None, None), finite)


def values_of(name: str) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5)
    if name == "BYTES":
        text = st.text(max_size=8).filter(lambda value: not value.endswith("\0"))  # numpy drops a trailing NUL
        return hnp.arrays(object, shapes, elements=text)
    dtype = BY_NAME[name].numpy
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return hnp.arrays(dtype, shapes, elements=hnp.from_dtype(dtype, **finite))


@pytest.mark.parametrize("name", [datatype.name for datatype in DATATYPES])
@given(data=st.data())
def test_every_datatype_survives_json_and_raw_bytes(name: str, data: st.DataObject) -> None:
    values = data.draw(values_of(name))
    what = spec(name, *([None] * values.ndim))
    nested = orjson.loads(orjson.dumps(to_json(values), option=orjson.OPT_SERIALIZE_NUMPY))
    flat = orjson.loads(orjson.dumps(to_json(values.reshape(-1)), option=orjson.OPT_SERIALIZE_NUMPY))
    for read in (
        from_json(what, values.shape, nested),
        from_json(what, values.shape, flat),
        from_bytes(what, values.shape, memoryview(to_bytes(values))),
    ):
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values)


REFUSED: list[tuple[str, list[int], Any, str]] = [
    ("FP32", [2, 2], [[1, 2], [3]], "expected 2 values in every row (axis 1), got 1 in row 1"),
    ("FP32", [2, 2], [[1, 2]], "expected 2 rows"),
    ("FP32", [1, 2], [1, 2, 3], "expected 2 values for shape [1, 2], got 3 values"),
    ("FP32", [1, 2], [1, "2"], "expected FP32 values, got '2' at element 1"),
    ("FP32", [1, 2], {"a": 1}, "expected a list of values"),
    ("INT64", [1, 2], [1, 2.5], "expected INT64 values, got 2.5 at element 1"),
    ("INT64", [1, 2], [1, None], "expected INT64 values, got None at element 1"),
    ("INT64", [1, 1], [2**63], "got 9223372036854775808"),
    ("UINT8", [1, 2], [255, 256], "expected UINT8 values, got 256 at element 1"),
    ("UINT8", [1, 1], [-1], "got -1"),
    ("FP32", [], [[1.0]], "expected one value, got [[1.0]]"),
    ("BOOL", [1, 1], ["yes"], "expected true or false, got 'yes'"),
    ("BYTES", [1, 1], [7], "expected strings, got 7"),
    ("FP32", [2, 2], [[1, 2], 3], "expected a list of 2 values at row 1"),
    ("FP32", [1, 1], [[[1]]], "got [1]"),
]


@pytest.mark.parametrize(("name", "shape", "data", "says"), REFUSED)
def test_what_does_not_fit_is_named(name: str, shape: list[int], data: Any, says: str) -> None:
    with pytest.raises(OffContract) as refusal:
        from_json(spec(name), shape, data)
    assert str(refusal.value).startswith("input 'x': ")
    assert says in str(refusal.value)


NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)


@given(
    name=st.sampled_from(["FP32", "FP64"]),
    data=st.lists(NUMBERS | st.sampled_from([None, True, "1", [], [1], [[1.5], 2], -0.0, 1e39, 1e-320]), max_size=6),
    more=st.sampled_from([b"", b" ", b"]", b",1", b"]]"]),
)
def test_numbers_read_from_text_are_those_that_the_parser_gives(name: str, data: list[Any], more: bytes) -> None:
    """Anything else than as many plain numbers as there should be is left to it."""
    text, shape = orjson.dumps(data, default=str) if _fits(data) else str(data).encode(), (len(data),)
    text += more
    values = from_text(spec(name, None), shape, text)
    if values is not None:
        expected = from_json(spec(name, None), shape, orjson.loads(text))
        assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(values, expected)
    elif not more.strip() and all(type(value) is float for value in data):
        raise AssertionError("plain numbers are to be read")


def _fits(data: list[Any]) -> bool:
    return all(type(value) is not int or -(2**63) <= value < 2**64 for value in data)


def test_only_flat_lists_of_the_right_length_are_read_from_text() -> None:
    assert from_text(spec("FP32", 2), [2], b"[1, 2.5]") is not None
    for text in (b"[1]", b"[1,2,3]", b"[[],[1,2]]", b"[[1,2]]", b"[1,null]", b"[1,true]", b"[1,2", b"3", b"{}"):
        assert from_text(spec("FP32", 2), [2], text) is None
    for name in ("INT64", "FP16"):  # halves: 1 + 2**-11 + 2**-30 is rounded to single precision first, as by the parser
        assert from_text(spec(name, 2), [2], b"[1,2]") is None
    with pytest.raises(OffContract, match="finite"):
        from_text(spec("FP32", 2, finite=True), [2], b"[1,1e39]")


def test_null_is_nan_where_the_type_has_it_and_the_contract_allows_it() -> None:
    assert np.isnan(from_json(spec("FP32"), [1, 1], [None])).all()
    with pytest.raises(OffContract, match="expected finite numbers, got nan at element 1"):
        from_json(spec("FP32", None, None, finite=True), [1, 2], [1, None])
    with pytest.raises(OffContract, match="finite"):
        from_bytes(spec("FP64", None, finite=True), [1], memoryview(np.array([np.inf]).tobytes()))


@given(raw=st.binary(max_size=64), count=st.integers(0, 2**39), name=st.sampled_from(sorted(BY_NAME)))
def test_raw_bytes_of_any_length_are_read_or_refused(raw: bytes, count: int, name: str) -> None:
    """A lying shape never becomes an allocation, a crash or another error than OffContract."""
    try:
        values = from_bytes(spec(name, None), [count], memoryview(raw))
    except OffContract:
        return
    assert values.shape == (count,)


def test_a_bool_is_never_another_byte_than_0_or_1() -> None:
    assert from_bytes(spec("BOOL", None), [3], memoryview(b"\x00\x01\x07")).view(np.uint8).tolist() == [0, 1, 1]
