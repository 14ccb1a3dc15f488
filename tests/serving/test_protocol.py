"""The protocols, without I/O: what each form of a request becomes, and how the answer is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import protocol
from serving.errors import Malformed, Refused
from serving.model import Signature
from serving.protocol import BINARY, Call, Identity, InferenceProtocol
from serving.protocol_mlflow import MlflowProtocol
from serving.protocol_tfserving import TfServingProtocol
from serving.tensors import BY_NAME, Tensor


def tensor(name: str, datatype: str, *shape: int | str | None) -> Tensor:
    return Tensor(name, BY_NAME[datatype], shape)


def identity(inputs: Sequence[Tensor], outputs: Sequence[Tensor], batch: bool = True) -> Identity:
    return Identity("m", "7", Signature(tuple(inputs), tuple(outputs), batch))


ONE = identity([tensor("f", "FP32", "N", 2)], [tensor("score", "FP32", "N", 1)])
TWO = identity(
    [tensor("a", "FP32", "N"), tensor("s", "BYTES", "N")],
    [tensor("label", "INT64", "N"), tensor("p", "FP32", "N", 2)],
)


def oip(**request: Any) -> bytes:
    return json.dumps(request).encode()


def given_input(name: str = "f", datatype: str = "FP32", shape: Sequence[int] = (1, 2), **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": [1, 2], **more}


def answer(call: Call, *outputs: np.ndarray) -> Any:
    return orjson.loads(call.encode(list(outputs)).body)


def test_json_in_and_out() -> None:
    call = InferenceProtocol(ONE).decode(oip(id="q", inputs=[given_input()]))
    np.testing.assert_array_equal(call.feeds["f"], np.array([[1, 2]], dtype=np.float32))
    assert (call.id, call.rows) == ("q", 1)
    assert answer(call, np.array([[0.1]], dtype=np.float32)) == {
        "model_name": "m",
        "model_version": "7",
        "id": "q",
        "outputs": [{"name": "score", "datatype": "FP32", "shape": [1, 1], "data": [0.1]}],
    }


def test_raw_tensors_in_and_out() -> None:
    raw = np.array([[1, 2], [3, 4]], dtype=np.float32).tobytes()
    head = oip(
        inputs=[{"name": "f", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": len(raw)}}],
        outputs=[{"name": "score", "parameters": {"binary_data": True}}],
    )
    call = InferenceProtocol(ONE).decode(head + raw, len(head))
    assert call.feeds["f"].tolist() == [[1, 2], [3, 4]]
    reply = call.encode([np.array([[0.5], [0.25]], dtype=np.float32)])
    assert reply.content_type == BINARY
    assert reply.header_length is not None
    described = orjson.loads(reply.body[: reply.header_length])["outputs"][0]
    assert described["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(reply.body[reply.header_length :], np.float32).tolist() == [0.5, 0.25]


def test_the_same_head_again_means_the_same_and_is_checked_as_before() -> None:
    """The head of a raw request is remembered; what follows it is not."""
    codec = InferenceProtocol(ONE)
    raw_input = {"name": "f", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    head = oip(inputs=[raw_input], parameters={"binary_data_output": True})
    for values in ([1, 2], [3, 4], [5, 6]):
        call = codec.decode(head + np.array(values, dtype=np.float32).tobytes(), len(head))
        assert call.feeds["f"].tolist() == [values]
        assert call.rows == 1
        reply = call.encode([np.array([values[:1]], dtype=np.float32)])
        assert reply.header_length is not None
        assert orjson.loads(reply.body[: reply.header_length])["outputs"][0]["shape"] == [1, 1]
        assert np.frombuffer(reply.body[reply.header_length :], np.float32).tolist() == values[:1]
    for wrong in (b"", bytes(7), bytes(9)):
        with pytest.raises(Refused):
            codec.decode(head + wrong, len(head))


FORMS: list[tuple[bytes, bytes]] = [
    (b'{"inputs":[{"name":"f","datatype":"FP32","shape":[1,2],"data":', b"}]}"),
    (b'{"inputs":[{"name":"f","data":', b',"datatype":"FP32","shape":[1,2]}],"outputs":[{"name":"score"}]}'),
    (b'{"parameters":{"data":[7]},"inputs":[{"name":"f","datatype":"FP32","shape":[1,2],"data" : ', b" } ] }\n"),
    (b'{"a":"\\"data\\":[1,2]","inputs":[{"name":"f","datatype":"FP32","shape":[1,2],"data":', b"}]}"),
    (b'{"inputs":[{"name":"f","datatype":"FP32","shape":[1,2],"data":[0,0],"data":', b"}]}"),
]
DATA = [b"[1,2]", b"[3, 4.5]", b"[[5,6]]", b"[1e39,0]", b"[null,1]", b"[-7,8]"]
NO_DATA = [
    b"[1]",
    b"[1,2,3]",
    b"[]",
    b"[[1],[2]]",
    b'["1",2]',
    b"[1,2",
    b"[1,2]]",
    b'[1,2],"x":[3]',
    b"[1,2]}",
    b"[NaN,1]",
]


@pytest.mark.parametrize(("before", "after"), FORMS)
def test_the_same_words_around_other_numbers_mean_the_same_and_are_checked_as_before(
    before: bytes, after: bytes
) -> None:
    """What stands around the numbers is remembered; a codec that remembers agrees with one that does not."""
    codec = InferenceProtocol(ONE)
    for data in (*DATA, *NO_DATA, *DATA):
        outcomes = []
        for one in (codec, InferenceProtocol(ONE)):
            try:
                call = one.decode(before + data + after)
                outcomes.append((call.rows, call.feeds["f"].tolist(), answer(call, np.array([[1]], np.float32))))
            except Refused as refusal:
                outcomes.append(str(refusal))
        assert repr(outcomes[0]) == repr(outcomes[1])


@pytest.mark.parametrize(("before", "after"), FORMS[:2])
def test_around_other_numbers_nothing_is_parsed_again(
    before: bytes, after: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = InferenceProtocol(ONE)
    codec.decode(before + b"[1,2]" + after)
    monkeypatch.setattr(protocol, "parse", None)
    assert codec.decode(before + b"[3, 4.5]" + after).feeds["f"].tolist() == [[3, 4.5]]


def test_an_answer_names_the_id_whatever_came_before() -> None:
    codec = InferenceProtocol(ONE)
    for call_id in ("", 'a"b', "", "c"):
        more = {"id": call_id} if call_id else {}
        said = answer(codec.decode(oip(inputs=[given_input()], **more)), np.array([[0.1]], np.float32))
        assert said.get("id", "") == call_id


def test_json_and_raw_tensors_mix_in_one_answer_in_any_order() -> None:
    inputs = [given_input("a", shape=[2]), given_input("s", "BYTES", [2], data=["x", "y"])]
    label, p = np.array([1, 0]), np.array([[0.5, 0.25], [1, 2]], dtype=np.float32)
    codec = InferenceProtocol(TWO)
    for names in (["label", "p"], ["p", "label"]):
        for raw in (set(), {"p"}, {"label"}, {"p", "label"}):
            outputs = [{"name": name, "parameters": {"binary_data": name in raw}} for name in names]
            reply = codec.decode(oip(id="i", inputs=inputs, outputs=outputs)).encode([label, p])
            head = orjson.loads(reply.body[: reply.header_length])
            assert [tensor["name"] for tensor in head["outputs"]] == names
            rest = reply.body[reply.header_length :] if raw else b""
            for tensor in head["outputs"]:
                values = {"label": label, "p": p}[tensor["name"]]
                assert tensor["shape"] == list(values.shape)
                if tensor["name"] in raw:
                    size = tensor["parameters"]["binary_data_size"]
                    assert rest[:size] == values.tobytes()
                    rest = rest[size:]
                else:
                    assert tensor["data"] == values.reshape(-1).tolist()
            assert rest == b""


def test_json_and_raw_tensors_mix_in_one_request() -> None:
    raw = b"\x02\x00\x00\x00hi"
    raw_input = {"name": "s", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    json_input = {"name": "a", "datatype": "FP32", "shape": [1], "data": [3]}
    head = oip(inputs=[raw_input, json_input])
    call = InferenceProtocol(TWO).decode(head + raw, len(head))
    assert call.feeds["s"].tolist() == ["hi"]
    assert call.feeds["a"].tolist() == [3]


def test_only_the_outputs_asked_for_come_back_in_their_order() -> None:
    inputs = [given_input("a", shape=[2]), given_input("s", "BYTES", [2], data=["x", "y"])]
    call = InferenceProtocol(TWO).decode(oip(inputs=inputs, outputs=[{"name": "p"}, {"name": "label"}]))
    said = answer(call, np.array([1, 2]), np.zeros((2, 2), np.float32))
    assert [output["name"] for output in said["outputs"]] == ["p", "label"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "'inputs' must be a list"),
    ({"inputs": [7]}, "an input must be an object, not a number"),
    ({"inputs": []}, "input 'f': expected FP32 of shape [-1, 2], got nothing: it is missing"),
    ({"inputs": [given_input("g")]}, "input 'g': expected one of f"),
    ({"inputs": [given_input(), given_input()]}, "input 'f': expected to be given once"),
    ({"inputs": [given_input(datatype="FP64")]}, "input 'f': expected datatype FP32, got FP64"),
    ({"inputs": [given_input(shape=[1, 3])]}, "input 'f': expected shape [-1, 2], got shape [1, 3]"),
    ({"inputs": [given_input(shape=[2])]}, "input 'f': expected shape [-1, 2], got shape [2]"),
    ({"inputs": [given_input(shape=[True, 2])]}, "input 'f': expected a shape: a list of lengths"),
    ({"inputs": [given_input(shape=[-1, 2])]}, "input 'f': expected a shape"),
    ({"inputs": [given_input(shape=[0, 2], data=[])]}, "input 'f': expected at least one row"),
    ({"inputs": [given_input(parameters={"binary_data_size": 8})]}, "binary_data_size"),
    ({"inputs": [given_input(parameters={"shared_memory_region": "r"})]}, "shared memory"),
    ({"inputs": [given_input()], "outputs": [{"name": "other"}]}, "output 'other' is not one of score"),
    ({"inputs": [given_input()], "outputs": [{"name": "score"}] * 2}, "asked for twice"),
    ({"inputs": [given_input()], "id": 7}, "'id' must be a string"),
    ({"inputs": [given_input()], "parameters": 7}, "'parameters' must be an object"),
]


@pytest.mark.parametrize(("request_", "says"), REFUSED)
def test_a_request_off_the_contract_is_named(request_: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused) as refusal:
        InferenceProtocol(ONE).decode(oip(**request_))
    assert says in str(refusal.value)


def test_inputs_must_agree_on_the_rows() -> None:
    inputs = [given_input("a", shape=[2]), given_input("s", "BYTES", [1], data=["x"])]
    with pytest.raises(Refused, match="input 's': expected 2 rows, as in 'a', got 1 rows"):
        InferenceProtocol(TWO).decode(oip(inputs=inputs))


def test_a_header_length_beyond_the_body_is_refused() -> None:
    with pytest.raises(Malformed, match="Inference-Header-Content-Length is 99, the body has 2 bytes"):
        InferenceProtocol(ONE).decode(b"{}", 99)


def test_bytes_that_no_input_claims_are_refused() -> None:
    head = oip(inputs=[given_input()])
    with pytest.raises(Malformed, match="3 bytes of tensor data belong to no input"):
        InferenceProtocol(ONE).decode(head + b"abc", len(head))


TF: list[tuple[Identity, dict[str, Any], dict[str, list[Any]]]] = [
    (ONE, {"instances": [[1, 2], [3, 4]]}, {"f": [[1, 2], [3, 4]]}),
    (ONE, {"instances": [{"f": [1, 2]}]}, {"f": [[1, 2]]}),
    (ONE, {"inputs": [[1, 2]]}, {"f": [[1, 2]]}),
    (ONE, {"inputs": {"f": [[1, 2]]}}, {"f": [[1, 2]]}),
    (TWO, {"instances": [{"a": 1, "s": "x"}, {"a": 2, "s": "y"}]}, {"a": [1, 2], "s": ["x", "y"]}),
    (TWO, {"inputs": {"a": [1, 2], "s": ["x", {"b64": "eQ=="}]}}, {"a": [1, 2], "s": ["x", "y"]}),
]


@pytest.mark.parametrize(("who", "request_", "feeds"), TF)
def test_tf_serving_rows_and_columns(who: Identity, request_: dict[str, Any], feeds: dict[str, list[Any]]) -> None:
    call = TfServingProtocol(who).decode(oip(**request_))
    assert {name: values.tolist() for name, values in call.feeds.items()} == feeds


def test_tf_serving_answers_rows_with_rows_and_columns_with_columns() -> None:
    label, p = np.array([1, 0]), np.array([[0.5, 0.25], [1, 2]], dtype=np.float32)
    by_row = TfServingProtocol(TWO).decode(oip(instances=[{"a": 1, "s": "x"}, {"a": 2, "s": "y"}]))
    assert answer(by_row, label, p) == {"predictions": [{"label": 1, "p": [0.5, 0.25]}, {"label": 0, "p": [1, 2]}]}
    by_column = TfServingProtocol(TWO).decode(oip(inputs={"a": [1, 2], "s": ["x", "y"]}))
    assert answer(by_column, label, p) == {"outputs": {"label": [1, 0], "p": [[0.5, 0.25], [1, 2]]}}
    bare = TfServingProtocol(ONE).decode(oip(instances=[[1, 2]]))
    assert answer(bare, np.array([[0.1]], dtype=np.float32)) == {"predictions": [[0.1]]}


@pytest.mark.parametrize("kind", "?bBhHiIlLqQefd")
def test_rows_are_written_whatever_the_numbers_are(kind: str) -> None:
    """ONNX Runtime's 64-bit integers are of another kind than NumPy's own."""
    label, p = np.array([1, 0]).astype(kind), np.array([0.5, 0.25], dtype=np.float32)
    expected = {"predictions": [{"label": 1, "p": 0.5}, {"label": 0, "p": 0.25}]}
    asked = {"instances": [{"a": 1, "s": "x"}, {"a": 2, "s": "y"}]}
    assert answer(TfServingProtocol(TWO).decode(oip(**asked)), label, p) == expected
    assert answer(MlflowProtocol(TWO).decode(oip(dataframe_records=asked["instances"])), label, p) == expected


MLFLOW: list[tuple[Identity, dict[str, Any], dict[str, list[Any]]]] = [
    (ONE, {"dataframe_split": {"columns": ["x", "y"], "data": [[1, 2], [3, 4]]}}, {"f": [[1, 2], [3, 4]]}),
    (ONE, {"dataframe_records": [{"x": 1, "y": 2}, {"y": 4, "x": 3}]}, {"f": [[1, 2], [3, 4]]}),
    (TWO, {"dataframe_split": {"columns": ["s", "a"], "data": [["x", 1]]}}, {"a": [1], "s": ["x"]}),
    (ONE, {"instances": [[1, 2]]}, {"f": [[1, 2]]}),
    (ONE, {"inputs": {"f": [[1, 2]]}}, {"f": [[1, 2]]}),
]


@pytest.mark.parametrize(("who", "request_", "feeds"), MLFLOW)
def test_mlflow_forms(who: Identity, request_: dict[str, Any], feeds: dict[str, list[Any]]) -> None:
    call = MlflowProtocol(who).decode(oip(**request_))
    assert {name: values.tolist() for name, values in call.feeds.items()} == feeds


def test_mlflow_answers_a_table_with_records() -> None:
    call = MlflowProtocol(ONE).decode(oip(dataframe_records=[{"x": 1, "y": 2}]))
    assert answer(call, np.array([[0.1]], dtype=np.float32)) == {"predictions": [{"score": 0.1}]}


@pytest.mark.parametrize(
    ("codec", "request_", "says"),
    [
        (TfServingProtocol, {}, "either 'instances' (rows) or 'inputs' (columns)"),
        (TfServingProtocol, {"instances": []}, "at least one row"),
        (TfServingProtocol, {"instances": [[1, 2], [3]]}, "expected 2 values in every row"),
        (TfServingProtocol, {"instances": [{"f": [1, 2]}, {"g": 1}]}, "row 1 of 'instances'"),
        (TfServingProtocol, {"inputs": {"g": 1}}, "input 'g' is not one of f"),
        (MlflowProtocol, {}, "exactly one of"),
        (MlflowProtocol, {"dataframe_split": {"columns": ["x"], "data": [[1, 2]]}}, "row 0"),
        (MlflowProtocol, {"dataframe_split": {"columns": ["x", "x"], "data": [[1, 2]]}}, "different names"),
        (MlflowProtocol, {"dataframe_records": [{"x": 1}, {"z": 1}]}, "row 1 of 'dataframe_records'"),
        (MlflowProtocol, {"dataframe_records": [{"x": 1}]}, "expected shape [-1, 2], got shape [1, 1]"),
    ],
)
def test_other_forms_name_what_is_wrong_too(codec: Any, request_: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused) as refusal:
        codec(ONE).decode(oip(**request_))
    assert says in str(refusal.value)


KEYS = st.sampled_from(
    ["inputs", "outputs", "name", "f", "a", "s", "shape", "data", "datatype", "parameters", "id"]
) | (st.sampled_from(["binary_data_size", "instances", "dataframe_split", "dataframe_records", "columns", "b64"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("codec", [InferenceProtocol, TfServingProtocol, MlflowProtocol])
@pytest.mark.parametrize("who", [ONE, TWO])
@given(body=st.dictionaries(KEYS, JSON, max_size=5), raw=st.binary(max_size=20), header=st.booleans())
def test_whatever_the_json_is_it_is_decoded_or_refused(
    codec: Any, who: Identity, body: dict[str, Any], raw: bytes, header: bool
) -> None:
    """No other exception than Refused, whatever a client sends."""
    head = json.dumps(body).encode()
    try:
        call = codec(who).decode(head + raw, len(head)) if header else codec(who).decode(head)
    except Refused:
        return
    assert call.rows > 0
