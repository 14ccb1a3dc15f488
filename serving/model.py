"""The model: bytes that were checked, a signature read from them, and an ONNX Runtime session that runs them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import CannotServe, ModelFailed, Refused
from serving.signing import NotSigned, Proof
from serving.tensors import BY_NAME, BY_ONNX, Array, Tensor

Feeds = dict[str, Array]

# Operators whose running time depends on the values: NodeProto.op_type is field 4 of the protobuf, hence the tag 0x22.
# A chance match in the weights only costs such a model a hop to the worker thread.
_CONTROL_FLOW = (b"\x22\x04Loop", b"\x22\x04Scan", b"\x22\x02If", b"\x22\x0bSequenceMap")
_FINITE = "lockgate.finite"  # metadata key in the ONNX file: the inputs (comma-separated) that must not hold NaN


@dataclass(frozen=True)
class Signature:
    """What goes in and comes out.

    `batch`: axis 0 of every input and output counts the rows, so several requests may run as one.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: bool

    def rows(self, feeds: Feeds) -> int:
        """How many rows a request has: axis 0 of its first input, which all inputs must share. Raises OffContract."""
        if not self.batch:
            first = next(iter(feeds.values()), None)
            return int(first.shape[0]) if first is not None and first.ndim else 1
        rows = int(feeds[self.inputs[0].name].shape[0])
        for spec in self.inputs:
            if feeds[spec.name].shape[0] != rows:
                raise spec.refuse(f"{rows} rows, as in '{self.inputs[0].name}'", f"{feeds[spec.name].shape[0]} rows")
        if rows == 0:
            raise self.inputs[0].refuse("at least one row", "none")
        return rows


@dataclass(frozen=True)
class SessionSettings:
    """How ONNX Runtime runs the model. More than one thread halves the rate of small tree models."""

    threads: int = 1
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    graph_level: str = "all"  # disabled, basic, extended or all
    finite: tuple[str, ...] = ()


class Model:
    """A loaded model. `steady`: its time depends on the number of rows only, not on the values.

    `row_s` is the measured CPU time per row (of a batch of one), or None where the warm-up could not tell.
    """

    def __init__(self, session: Any, digest: str, steady: bool, finite: Sequence[str] = ()) -> None:
        self.digest = digest
        self._session = session
        self.signature = _signature(session, finite)
        self._names = [spec.name for spec in self.signature.outputs]
        fixed_rows = all(isinstance(length, int) for spec in self.signature.inputs for length in spec.shape[1:])
        self.steady = steady and fixed_rows
        self.row_s: float | None = None

    @classmethod
    def load(
        cls,
        path: Path,
        digest: str | None = None,
        settings: SessionSettings | None = None,
        proof: Proof | None = None,
    ) -> Model:
        """The model in the file at `path`, whose bytes must have the SHA-256 `digest` (hexadecimal), and the `proof`.

        The very bytes that were checked are those that are loaded: the file is read once.
        Raises CannotServe.
        """
        settings = settings or SessionSettings()
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise CannotServe(f"cannot read the model file '{path}': {exc.strerror or exc}") from exc
        found = hashlib.sha256(content).hexdigest()
        if digest is not None and found != digest.lower().removeprefix("sha256:"):
            raise CannotServe(f"'{path}' has SHA-256 {found}, but {digest} was asked for; it will not be served")
        if proof is not None:
            try:
                proof.check(content)
            except NotSigned as exc:
                raise CannotServe(f"'{path}' will not be served: {exc}") from exc
        session = _session(path, content, settings)
        # A call that waits for a device shows no CPU time of its own; it belongs into the worker thread.
        steady = settings.providers == ("CPUExecutionProvider",) and not any(mark in content for mark in _CONTROL_FLOW)
        model = cls(session, found, steady, settings.finite)
        model._warm_up()
        return model

    def run(self, feeds: Feeds) -> list[Array]:
        """The outputs, in the signature's order. Raises ModelFailed with the runtime's own words."""
        try:
            outputs = self._session.run(self._names, feeds)
        except Exception as exc:  # the runtime raises many unrelated types; all mean the same here
            raise ModelFailed(f"the model failed: {_first_line(exc)}") from exc
        return [value if isinstance(value, np.ndarray) else _table(value) for value in outputs]

    def _warm_up(self) -> None:
        """Runs two made-up rows, alone and together: learns the time per row, and whether rows may be batched."""
        chance = np.random.default_rng(0)
        rows = [_made_up(self.signature, chance) for _ in range(2)]
        try:
            alone = [self.run(feeds) for feeds in rows]
            start = time.thread_time()
            self.run(rows[0])
            self.row_s = time.thread_time() - start
            if self.signature.batch:
                both = self.run({name: np.concatenate([feeds[name] for feeds in rows]) for name in rows[0]})
                expected = [np.concatenate(pair) for pair in zip(*alone, strict=True)]
                if not all(map(_same, both, expected)):
                    self.forbid_batching()
        except (Refused, ValueError):
            # A model may well refuse made-up values (an unknown category); it is then believed by its declared shape,
            # and the batcher looks again at every batch.
            return

    def forbid_batching(self) -> None:
        """From now on every request runs alone: the answers of rows that ran together were not theirs."""
        self.signature = replace(self.signature, batch=False)


def _session(path: Path, content: bytes, settings: SessionSettings) -> Any:
    from serving.runtime import ort  # here, so that a wrong file or digest is reported without the import's price

    unknown = set(settings.providers) - set(ort.get_available_providers())
    if unknown:
        known = ", ".join(ort.get_available_providers())
        raise CannotServe(f"execution provider {', '.join(sorted(unknown))} is not in this build; it has {known}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = {
        "disabled": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[settings.graph_level]
    try:
        return ort.InferenceSession(content, options, providers=list(settings.providers))
    except Exception as exc:  # as in Model.run
        raise CannotServe(f"'{path}' is not a model that ONNX Runtime can load: {_first_line(exc)}") from exc


def _signature(session: Any, finite: Sequence[str]) -> Signature:
    metadata: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    forbidden = {*finite, *filter(None, metadata.get(_FINITE, "").split(","))}
    inputs = tuple(_tensor(value, value.name in forbidden) for value in session.get_inputs())
    if unknown := forbidden - {spec.name for spec in inputs}:
        raise CannotServe(f"'{sorted(unknown)[0]}' must be finite, but is not an input of the model")
    outputs = tuple(_tensor(value) for value in session.get_outputs())
    return Signature(inputs, outputs, _declared_batch(inputs, outputs))


def _tensor(value: Any, finite: bool = False) -> Tensor:
    if value.type.startswith("seq(map("):  # what scikit-learn's converters give for class probabilities
        return Tensor(value.name, BY_NAME["FP32"], (None, None))
    datatype = BY_ONNX.get(value.type)
    if datatype is None:
        raise CannotServe(f"'{value.name}' has the type {value.type}, which this server cannot carry")
    return Tensor(value.name, datatype, tuple(value.shape or ()), finite)


def _declared_batch(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> bool:
    """Whether the shapes say that axis 0 is the row everywhere: free, and never two different names for it."""
    if not inputs or any(not spec.shape or isinstance(spec.shape[0], int) for spec in (*inputs, *outputs)):
        return False
    return len({spec.shape[0] for spec in inputs} - {None}) <= 1


def _made_up(signature: Signature, chance: np.random.Generator) -> Feeds:
    feeds: Feeds = {}
    for spec in signature.inputs:
        shape = [length if isinstance(length, int) else 1 for length in spec.shape]
        if spec.datatype.name == "BYTES":
            feeds[spec.name] = np.full(shape, "", dtype=object)
        elif spec.datatype.numpy.kind == "f":
            feeds[spec.name] = chance.standard_normal(shape).astype(spec.datatype.numpy)
        else:
            feeds[spec.name] = chance.integers(0, 2, shape).astype(spec.datatype.numpy)
    return feeds


def _same(one: Array, other: Array) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind in "fc":
        return bool(np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True))
    return bool(np.array_equal(one, other))


def _table(value: Any) -> Array:
    """A sequence of {class: score} as rows of scores, classes in order."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        classes = sorted(value[0])
        return np.array([[row[name] for name in classes] for row in value], dtype=np.float32)
    raise ModelFailed(f"the model gave a {type(value).__name__}, which is no tensor")


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0][:300] if lines else type(exc).__name__
