"""What stands at which path, and what each answer's status is. The only place that maps errors to HTTP.

The Open Inference Protocol v2 under `/v2`, TensorFlow Serving's and KServe's first form under `/v1`, MLflow's scoring
protocol at `/invocations`, Prometheus' text at `/metrics`, the OpenAPI document at `/openapi.json`.
"""

from __future__ import annotations

import os
import traceback
import zlib
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import orjson

from policies.traffic import APART_HEADER, WAIT_HEADER
from serving import metrics as prometheus
from serving.batching import Batcher, Job, Outcome
from serving.connection import Exchange
from serving.errors import (
    Busy,
    Late,
    Malformed,
    ModelFailed,
    NotThere,
    OffContract,
    Refused,
    TooLarge,
    TooSlow,
    WrongMethod,
)
from serving.log import complain
from serving.metrics import Metrics
from serving.openapi import document
from serving.protocol import JSON, Call, Identity, InferenceProtocol
from serving.protocol_mlflow import MlflowProtocol
from serving.protocol_tfserving import TfServingProtocol
from serving.samples import UNSAMPLED
from serving.tensors import Tensor

STATUS: dict[type[Refused], int] = {
    Malformed: 400,
    OffContract: 400,
    NotThere: 404,
    WrongMethod: 405,
    TooSlow: 408,
    TooLarge: 413,
    Busy: 429,
    ModelFailed: 500,
    Late: 503,
}
_RETRY = b"retry-after: 1\r\n"
_APART = APART_HEADER.encode()
# How long the client will wait, or the gateway for it; the second is what other Envoys say of their route's time-out.
_DEADLINES = (WAIT_HEADER.encode(), b"x-envoy-expected-rq-timeout-ms")
_EXTENSIONS = ["binary_tensor_data", "statistics"]

Handler = Callable[[Exchange], None]


class Codec(Protocol):
    """One protocol's way to write requests, answers and errors."""

    def decode(self, body: bytes, header_length: int | None = None) -> Call:
        """The call that the body asks for. Raises Malformed or OffContract."""

    def error(self, message: str) -> bytes:
        """The body of an answer that says no."""


class Endpoints:
    """The handlers of one model's server."""

    def __init__(self, who: Identity, batcher: Batcher, metrics: Metrics, body_max: int) -> None:
        self._who, self._batcher, self._metrics, self._body_max = who, batcher, metrics, body_max
        self._plain = InferenceProtocol(who)
        self._made_ids = 0
        self._paths = self._table()

    # -- for the connections ---------------------------------------------------------------------------------------

    def handle(self, exchange: Exchange) -> None:
        """Answers the request, now or when the model has run. Never raises."""
        try:
            try:
                self._find(exchange)(exchange)
            except Refused as exc:
                self._say_no(exchange, self._plain, exc)
        except Exception:  # noqa: BLE001 - a fault of ours must cost this request and not the connection's parser
            self._broken(exchange)

    def refuse(self, exchange: Exchange, error: Refused) -> None:
        """Answers a request that could not even be read."""
        self._metrics.answered(STATUS[type(error)], 0.0)
        self._say_no(exchange, self._plain, error)

    def _find(self, exchange: Exchange) -> Handler:
        path = exchange.path
        found = self._paths.get(path)
        if found is None:
            path = unquote_to_bytes(path.partition(b"?")[0])
            found = self._paths.get(path) or self._paths.get(path.rstrip(b"/"))
        if found is None:
            raise NotThere(self._not_there(path.decode("utf-8", "replace")[:200]))
        handler = found.get(exchange.method) or (found.get(b"GET") if exchange.method == b"HEAD" else None)
        if handler is None:
            method, shown = exchange.method.decode("ascii", "replace"), path.decode("utf-8", "replace")[:200]
            raise WrongMethod(method, shown, ", ".join(name.decode() for name in found))
        return handler

    def _not_there(self, path: str) -> str:
        if path.startswith(("/v1/models/", "/v2/models/")):
            return f"'{path}' is not served here; this is model '{self._who.model}', version '{self._who.version}'"
        return f"there is nothing at '{path}'; see /openapi.json"

    def _say_no(self, exchange: Exchange, codec: Codec, error: Refused) -> int:
        status = STATUS[type(error)]
        extra = _RETRY if status in (429, 503) else b""
        if isinstance(error, WrongMethod):
            extra = f"allow: {error.allowed}\r\n".encode()
        exchange.reply(status, codec.error(str(error)), JSON, extra)
        return status

    # -- predictions -----------------------------------------------------------------------------------------------

    def _predict(self, codec: Codec) -> Handler:
        def handler(exchange: Exchange) -> None:
            try:
                self._submit(exchange, codec)
            except Refused as exc:
                self._count(exchange, self._say_no(exchange, codec, exc))

        return handler

    def _submit(self, exchange: Exchange, codec: Codec) -> None:
        headers = exchange.headers
        body = exchange.body
        if b"content-encoding" in headers:
            body = inflated(body, headers[b"content-encoding"].lower(), self._body_max)
        length = headers.get(b"inference-header-content-length")
        call = codec.decode(body, None if length is None else _whole(length, "Inference-Header-Content-Length"))
        given = headers.get(b"x-request-id")
        if given is not None:
            request_id = given.decode("latin-1")
        elif call.id:
            request_id = call.id
        else:
            self._made_ids += 1
            request_id = f"{self._metrics.epoch}-{self._made_ids}"
        if _APART in headers:  # not drawn by chance, so it does not stand for the traffic
            request_id = UNSAMPLED
        deadline = None
        for name in _DEADLINES:
            if name in headers:
                deadline = exchange.started + _whole(headers[name], name.decode()) / 1000
                break  # the client's own word goes before Envoy's

        def finish(outcome: Outcome) -> None:
            self._answer(exchange, codec, call, outcome)

        self._batcher.submit(Job(request_id, call.feeds, call.rows, len(body), deadline, finish), exchange.alone)

    def _answer(self, exchange: Exchange, codec: Codec, call: Call, outcome: Outcome) -> None:
        """Writes the answer when the model has run. Never raises: the other answers of the batch come after it."""
        try:
            if isinstance(outcome, Refused):
                raise outcome
            answer = call.encode(outcome)
            extra = b""
            if answer.header_length is not None:
                extra = b"inference-header-content-length: %d\r\n" % answer.header_length
            exchange.reply(200, answer.body, answer.content_type, extra)
            status = 200
        except Refused as exc:
            status = self._say_no(exchange, codec, exc)
        except Exception:  # noqa: BLE001 - as in `handle`
            status = self._broken(exchange)
        self._count(exchange, status)

    def _broken(self, exchange: Exchange) -> int:
        """A fault of ours: said on stderr, answered with 500."""
        complain(traceback.format_exc())
        if not exchange.finished:
            exchange.reply(500, self._plain.error("the server itself failed on this request"), JSON)
        return 500

    def _count(self, exchange: Exchange, status: int) -> None:
        self._metrics.answered(status, (perf_counter() - exchange.started) * 1000)

    # -- everything else -------------------------------------------------------------------------------------------

    def _table(self) -> dict[bytes, dict[bytes, Handler]]:
        who = self._who
        table: dict[bytes, dict[bytes, Handler]] = {
            b"/metrics": {b"GET": self._scrape},
            b"/openapi.json": {b"GET": _fixed(document(who))},
            b"/v2": {b"GET": _fixed({"name": "lockgate", "version": "1", "extensions": _EXTENSIONS})},
            b"/v2/health/live": {b"GET": _fixed({"live": True})},
            b"/v2/health/ready": {b"GET": self._ready({"ready": True})},
        }
        rows, tables = TfServingProtocol(who), MlflowProtocol(who)
        table[b"/invocations"] = {b"POST": self._predict(tables)}
        table[b"/ping"] = table[b"/health"] = {b"GET": self._ready({})}
        for version in ("", f"/versions/{who.version}"):
            base = f"/v1/models/{who.model}{version}".encode()
            table[base] = {b"GET": self._ready(_tf_status(who))}
            table[base + b"/metadata"] = {b"GET": _fixed(rows.metadata())}
            table[base + b":predict"] = {b"POST": self._predict(rows)}
            base = f"/v2/models/{who.model}{version}".encode()
            table[base] = {b"GET": _fixed(self._metadata())}
            table[base + b"/ready"] = {b"GET": self._ready({"name": who.model, "ready": True})}
            table[base + b"/stats"] = {b"GET": self._stats}
            table[base + b"/infer"] = {b"POST": self._predict(self._plain)}
        return table

    def _metadata(self) -> dict[str, Any]:
        def described(tensors: tuple[Tensor, ...]) -> list[dict[str, Any]]:
            return [{"name": spec.name, "datatype": spec.datatype.name, "shape": spec.wire_shape} for spec in tensors]

        who, signature = self._who, self._who.signature
        tensors = {"inputs": described(signature.inputs), "outputs": described(signature.outputs)}
        return {"name": who.model, "versions": [who.version], "platform": "onnx_onnxv1", **tensors}

    def _ready(self, body: dict[str, Any]) -> Handler:
        def handler(exchange: Exchange) -> None:
            ready = self._metrics.ready
            exchange.reply(200 if ready else 503, orjson.dumps({**body, "ready": ready}), JSON)

        return handler

    def _scrape(self, exchange: Exchange) -> None:
        exchange.reply(200, self._metrics.text(), prometheus.CONTENT_TYPE)

    def _stats(self, exchange: Exchange) -> None:
        """Triton's statistics extension, as far as it applies."""
        counted = self._metrics
        answered = sum(counted.requests.values())
        failed = answered - counted.requests[200]

        def duration(count: int, seconds: float) -> dict[str, int]:
            return {"count": count, "ns": round(seconds * 1e9)}

        stats = {
            "name": self._who.model,
            "version": self._who.version,
            "inference_count": counted.rows,
            "execution_count": counted.runs,
            "inference_stats": {
                "success": duration(answered - failed, counted.latency_ms.total / 1000),
                "fail": duration(failed, 0.0),
                "queue": duration(sum(counted.queue_ms.counts), counted.queue_ms.total / 1000),
                "compute_infer": duration(counted.runs, counted.run_s),
            },
            "process": {"pid": os.getpid(), "resident_bytes": prometheus.resident_bytes()},
        }
        exchange.reply(200, orjson.dumps({"model_stats": [stats]}), JSON)


def _fixed(answer: dict[str, Any]) -> Handler:
    body = orjson.dumps(answer)
    return lambda exchange: exchange.reply(200, body, JSON)


def _tf_status(who: Identity) -> dict[str, Any]:
    """TensorFlow Serving's status of the model, with the two fields in which KServe's first protocol says the same."""
    status = {"error_code": "OK", "error_message": ""}
    listed = [{"version": who.version, "state": "AVAILABLE", "status": status}]
    return {"name": who.model, "ready": True, "model_version_status": listed}


def _whole(text: bytes, name: str) -> int:
    if not text.isdigit() or len(text) > 15:
        raise Malformed(f"header {name} must be a whole number, not '{text.decode('latin-1')[:40]}'")
    return int(text)


def inflated(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The body as it was before Content-Encoding; never more than `limit` bytes. Raises Malformed or TooLarge."""
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise Malformed(f"content-encoding '{encoding.decode('latin-1')[:40]}' is not understood; use gzip or deflate")
    machine = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: by its header, gzip or zlib
    try:
        plain = machine.decompress(body, limit + 1)
    except zlib.error as exc:
        raise Malformed(f"the body is not {encoding.decode()}: {exc}") from None
    if len(plain) > limit:
        raise TooLarge(f"the body unpacks to more than {limit} bytes, which is the most that is taken")
    if not machine.eof:
        raise Malformed("the compressed body ends too early")
    return plain
