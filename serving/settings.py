"""Settings of one model server, and the command line that gives them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.batching import Limits
from serving.model import SessionSettings
from serving.samples import SampleSettings
from serving.signing import Proof


@dataclass(frozen=True)
class HttpLimits:
    """Bounds for what clients may cost. Sizes in bytes, times in seconds."""

    body_max: int = 32 * 2**20
    held_max: int = 512 * 2**20  # bodies of all requests together, arriving or waiting
    head_max: int = 32 * 2**10
    connections_max: int = 4096
    request_s: float = 20.0  # from a request's first byte to its last, and for an answer to be taken
    idle_s: float = 3700.0  # longer than Envoy's own hour, so that it is never we who cut a connection it reuses


@dataclass(frozen=True)
class Settings:
    """All that one server process is told."""

    model: str
    version: str
    path: Path
    digest: str | None = None
    proof: Proof | None = None
    uds: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    session: SessionSettings = field(default_factory=SessionSettings)
    limits: Limits = field(default_factory=Limits)
    http: HttpLimits = field(default_factory=HttpLimits)
    prediction_output: str | None = None
    prediction_column: int = -1
    samples: SampleSettings | None = None
    batching: bool = True
    drain_s: float = 30.0
    linger_s: float = 0.3


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m serving.server`."""
    made = argparse.ArgumentParser(prog="serving.server", description="Serve one version of an ONNX model.")
    add = made.add_argument
    add("--model", required=True, help="the model's name, as clients know it")
    add("--version", default="1", help="its version")
    add("--path", required=True, type=Path, help="the .onnx file")
    add("--digest", help="SHA-256 of the file's bytes (hexadecimal); anything else is not loaded")
    add("--signature", help="of the file's bytes (base64), by one of the keys; anything else is not loaded")
    add("--signed-by", action="append", default=[], metavar="KEY", help="a public key (the base64 lines of a PEM file)")
    add("--uds", type=Path, help="listen on this Unix socket instead of host and port")
    add("--host", default="127.0.0.1")
    add("--port", default=8000, type=_port, help="0: any free one (it is printed)")
    add("--threads", default=1, type=_positive, help="ONNX Runtime threads; more than one slows small models down")
    add("--providers", default="CPUExecutionProvider", help="ONNX Runtime execution providers, comma-separated")
    add("--graph-level", default="all", choices=("disabled", "basic", "extended", "all"))
    add("--finite", action="append", default=[], metavar="INPUT", help="refuse NaN and infinities in this input")
    add("--prediction-output", help="the output that holds the prediction; default: the last float one")
    add("--prediction-column", default=-1, type=int, help="its column")
    add("--no-batching", dest="batching", action="store_false", help="run every request alone")
    add("--max-batch-rows", default=1024, type=_positive, help="rows per run")
    add("--inline-ms", default=5.0, type=float, help="a run expected to take longer runs in the worker thread")
    add(
        "--run-timeout",
        default=60.0,
        type=float,
        help="not ready while a run lasts longer than expected by so much (seconds)",
    )
    add("--samples", type=Path, metavar="DIR", help="keep sampled rows there, as Arrow files")
    add("--sample-share", default=1.0, type=_share, help="share of the requests whose rows are kept")
    add("--samples-max-mb", default=256, type=_positive, help="the oldest files are deleted beyond it")
    add("--sample-rows-max", default=20_000, type=_positive, help="rows kept per file; the rest is dropped and counted")
    add("--max-queue-rows", default=4096, type=_positive, help="rows that may wait; beyond: 429")
    add("--max-queue-mb", default=256, type=_positive, help="megabytes of requests that may wait; beyond: 429")
    add("--max-body-mb", default=32, type=_positive, help="a larger request gets 413")
    add("--max-connections", default=4096, type=_positive)
    add("--request-timeout", default=20.0, type=float, help="seconds that a client may take to send a request")
    add("--idle-timeout", default=3700.0, type=float, help="seconds that an idle connection is kept")
    add("--drain-timeout", default=30.0, type=float, help="seconds to finish accepted requests after SIGTERM")
    return made


def from_arguments(argv: Sequence[str] | None = None) -> Settings:
    """The settings on the command line. Exits with code 2 and a sentence for wrong usage."""
    made = parser()
    given = made.parse_args(argv)
    if (given.signature is None) != (not given.signed_by):
        made.error("--signature and --signed-by go together")
    samples = None
    if given.samples is not None and given.sample_share > 0:
        samples = SampleSettings(
            given.samples, given.sample_share, given.samples_max_mb * 2**20, rows_max=given.sample_rows_max
        )
    return Settings(
        model=given.model,
        version=given.version,
        path=given.path,
        digest=given.digest,
        proof=None if given.signature is None else Proof(given.signature, given.signed_by),
        uds=given.uds,
        host=given.host,
        port=given.port,
        session=SessionSettings(
            given.threads, tuple(given.providers.split(",")), given.graph_level, tuple(given.finite)
        ),
        limits=Limits(
            given.max_queue_rows,
            given.max_queue_mb * 2**20,
            given.max_batch_rows,
            given.inline_ms,
            run_s=given.run_timeout,
        ),
        http=HttpLimits(
            body_max=given.max_body_mb * 2**20,
            held_max=max(512, 2 * given.max_body_mb) * 2**20,
            connections_max=given.max_connections,
            request_s=given.request_timeout,
            idle_s=given.idle_timeout,
        ),
        prediction_output=given.prediction_output,
        prediction_column=given.prediction_column,
        samples=samples,
        batching=given.batching,
        drain_s=given.drain_timeout,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{value} is not a port number (0 to 65535)")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not a share between 0 and 1")
    return value
