"""Recorded traffic, answered anew: what a model's servers sampled, or a file of rows, put to a candidate's bytes.

The candidate runs in this process, on the recorded inputs: nothing is deployed, and no server is asked.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import rows, scores_onnx
from infra.drift_evidently import EvidentlyDrift
from infra.samples_arrow import SampledRows, requests_of
from policies import shifts
from policies.evidence import Drift
from policies.policy import Policy
from policies.rehearsal import Compare, Recording
from tasks.ports import BadInput, NotThere, PortError, Signature, Tensor

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


class ArrowRecordings:
    """The recordings of one agent's servers. `drift` compares their rows."""

    def __init__(self, agent_home: Path, drift: EvidentlyDrift) -> None:
        self._samples, self._drift = SampledRows(agent_home), drift

    def sampled(
        self, policy: Policy, model: str, stable: str, candidate: Candidate, hours: float
    ) -> tuple[Recording, Compare]:
        """What the stable version answered in the last hours. Raises NotThere where nothing of it is left."""
        import numpy as np

        table = self._samples.read(model, stable, time.time() - 3600.0 * hours)
        if table.num_rows == 0:
            raise NotThere(f"v{stable} of {model} has no sampled row of the last {hours:g} h; give a file with --rows")
        failed = np.asarray(table["status"]) >= 400
        stable_s = np.where(failed, np.nan, np.asarray(table["prediction"].cast("float64").fill_null(np.nan)))
        feeds = {tensor.name: _sampled_input(table, tensor) for tensor in candidate.signature.inputs}
        lots = [zlib.crc32(request.encode()) / 2**32 for request in table["request_id"].to_pylist()]
        at, (predictions, broken) = np.asarray(table["time"], dtype=float), candidate.answers(policy, feeds)
        recording = Recording(at, np.asarray(lots), stable_s, predictions, failed, broken)
        return recording, self._compare(policy, table, recording, requests_of(table), lambda name: f"in.{name}")

    def in_file(
        self, policy: Policy, path: Path, rps: float, stable: Candidate, candidate: Candidate
    ) -> tuple[Recording, Compare]:
        """The file's rows, one after the other at so many a second, answered by the bytes of both. Raises BadInput."""
        import numpy as np

        table = rows.read(path, text=rows.text_inputs(candidate.signature))
        (first, failed), (second, broken) = (
            each.answers(policy, rows.feeds(table, each.signature, path, policy.checks.label))
            for each in (stable, candidate)
        )
        lots = np.random.default_rng(1).random(table.num_rows)
        recording = Recording(np.arange(table.num_rows) / rps, lots, first, second, failed, broken)
        return recording, self._compare(policy, table, recording, np.arange(table.num_rows), lambda name: name)

    def _compare(
        self,
        policy: Policy,
        table: pa.Table,
        recording: Recording,
        requests: NDArray[np.int64],
        named: Callable[[str], str],
    ) -> Compare:
        """`requests` says which request each row is of, by number, in the order of their first rows."""
        import pyarrow as pa

        gate = policy.rollout.gates.drift
        if gate is None:
            return lambda _stable, _candidate: None
        columns = [name if name == rows.PREDICTION else named(name) for name in gate.columns]
        missing = [name for name in columns if name != rows.PREDICTION and name not in table.column_names]
        if missing:
            raise BadInput(f"the recording has no {', '.join(missing)}, which the drift gate compares")

        def side(answers: NDArray[np.float64], numbers: NDArray[np.int64]) -> pa.Table:
            chosen = {name: table[name].take(pa.array(numbers)) for name in columns if name != rows.PREDICTION}
            keys = {"request_id": requests[numbers], "time": recording.at[numbers]}
            keys = {} if keys.keys() & chosen.keys() else keys  # a file's columns may have these names
            return pa.table({**keys, **chosen, rows.PREDICTION: answers[numbers]})

        def compare(stable: NDArray[np.int64], candidate: NDArray[np.int64]) -> Drift | None:
            newest = [numbers[-shifts.WINDOW_ROWS :] for numbers in (stable, candidate)]
            begun = min((numbers[0] for numbers in newest if len(numbers)), default=0)
            both = [numbers[numbers >= begun] for numbers in (stable, candidate)]
            chosen = shifts.together([each.astype(float) for each in both], [requests[each] for each in both])
            first = side(recording.stable, both[0][chosen[0]])
            second = side(recording.candidate, both[1][chosen[1]])
            try:
                return self._drift.compare(first, second, tuple(columns), gate.method)
            except NotThere:
                return None

        return compare


class Candidate:
    """Bytes that answer recorded rows."""

    def __init__(self, onnx: Path, digest: str, signature: Signature) -> None:
        self.onnx, self.digest, self.signature = onnx, digest, signature

    @classmethod
    def of_file(cls, onnx: Path, signature: Signature) -> Candidate:
        """Bytes that nobody has registered."""
        with onnx.open("rb") as file:
            return cls(onnx, hashlib.file_digest(file, "sha256").hexdigest(), signature)

    def answers(self, policy: Policy, feeds: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The prediction of each row, and which it fails on. Raises BadInput for rows that it cannot be asked."""
        chosen = policy.prediction
        return scores_onnx.answers(self.onnx, self.digest, feeds, chosen.output, chosen.column)


def _sampled_input(table: pa.Table, tensor: Tensor) -> NDArray[Any]:
    """The input as the model gets it, from the columns that samples keep it in. Raises PortError for one not kept."""
    import numpy as np

    kind = rows.NUMPY_OF[tensor.dtype]
    if len(tensor.shape) < 2:
        names = [f"in.{tensor.name}"]
    else:
        width = sum(name.startswith(f"in.{tensor.name}.") for name in table.column_names)
        names = [f"in.{tensor.name}.{at}" for at in range(width)]
    if not names or any(name not in table.column_names for name in names):
        raise PortError(
            f"the sampled rows do not hold the input '{tensor.name}' (too wide to keep, or of other models)"
        )
    columns = [np.asarray(table[name].to_pylist(), dtype=object if kind == "object" else kind) for name in names]
    if len(tensor.shape) < 2:
        return columns[0]
    try:
        return np.stack(columns, axis=1).reshape(-1, *tensor.shape[1:])
    except ValueError as exc:
        raise PortError(f"the sampled input '{tensor.name}' has {len(names)} values, not {list(tensor.shape)}") from exc
