"""A small model of one's own, as a newcomer has it: scikit-learn, exported to ONNX, with labelled rows in CSV files.

`python -m tests.e2e.toy FOLDER` writes one, with a policy and a request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

POLICY = """
policy: toy
benchmark: {slo: {latency_ms_p99: 500}, duration: 1s, regression_max: 20}
rollout:
  stages:
    - shadow: {share: 1.0, for: 3s}
    - canary: {weight: 40, for: 4s}
  gates:
    errors: {margin: 0.1}
  watch: {for: 3s, shadow: 0.5}
  burn_in: 1s
  patience: 60s
"""
REQUEST = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 0.2, 0.3, 0.4]}
COLUMNS = ("age", "income", "visits", "clicks")


def make(
    folder: Path, seed: int = 1, columns: tuple[str, ...] = COLUMNS, label: str = "label", flipped: bool = False
) -> Path:
    """Trains and writes model.onnx, validation.csv and expected.csv; returns the folder. `flipped`: on wrong labels."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(4000, len(columns))).astype(np.float32)
    truth = (inputs[:, 0] - inputs[:, 1] + random.normal(size=4000) > 0).astype(int)
    model = LogisticRegression().fit(inputs[:2000], 1 - truth[:2000] if flipped else truth[:2000])
    onnx = to_onnx(model, inputs[:1], options={"zipmap": False})
    (folder / "model.onnx").write_bytes(onnx.SerializeToString())
    _write(folder / "validation.csv", (*columns, label), np.column_stack([inputs[2000:], truth[2000:]]))
    seen = model.predict_proba(inputs[2000:2200])[:, 1]
    _write(folder / "expected.csv", (*columns, "prediction"), np.column_stack([inputs[2000:2200], seen]))
    return folder


def _write(path: Path, names: tuple[str, ...], rows: np.ndarray) -> None:
    lines = [",".join(names), *(",".join(f"{value:.9g}" for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    made = make(Path(sys.argv[1]))
    (made / "policy.yaml").write_text(POLICY.replace("policy: toy", "policy: mine"))
    (made / "request.json").write_text(json.dumps({"inputs": [REQUEST]}))
    print(f"{made}: model.onnx, validation.csv, expected.csv, policy.yaml, request.json")
