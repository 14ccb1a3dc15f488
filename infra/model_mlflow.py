"""The folder that `mlflow.onnx` makes of a model, and reads it from.

Only `registry_mlflow` calls this, after it has switched MLflow's telemetry off and imported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import rows
from tasks.ports import BadInput, Signature, Tensor


def onnx_within(found: Path, source: str) -> Path:
    """The .onnx file of an MLflow model folder (or the file itself)."""
    if found.is_file():
        return found
    description = found / "MLmodel"
    if not description.is_file():
        raise BadInput(f"{source}: holds no MLflow model (no MLmodel file)")
    import yaml

    flavors = (yaml.safe_load(description.read_text(encoding="utf-8")) or {}).get("flavors", {})
    if "onnx" not in flavors:
        raise BadInput(
            f"{source}: is a model of {', '.join(flavors) or 'no'} flavour, not of mlflow.onnx; convert it to ONNX"
        )
    onnx = (found / str(flavors["onnx"].get("data", "model.onnx"))).resolve()
    if not onnx.is_relative_to(found.resolve()):
        raise BadInput(f"{source}: its MLmodel file points outside of the model, to {flavors['onnx']['data']}")
    return onnx


def save_model(onnx: Path, signature: Signature, expected: Path | None, folder: Path) -> None:
    """An mlflow.onnx model folder around exactly these bytes."""
    import mlflow.onnx
    import onnx as onnx_package

    from serving.runtime import ort

    mlflow.onnx.save_model(
        onnx_package.load(onnx),
        str(folder),
        signature=_mlflow_signature(signature),
        input_example=_example(signature, expected),
        # Without it MLflow starts a process to find out what the model imports: 8 to 14 s.
        pip_requirements=[f"onnxruntime=={ort.__version__}", f"onnx=={onnx_package.__version__}"],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    (folder / "model.onnx").write_bytes(onnx.read_bytes())


def _mlflow_signature(signature: Signature) -> Any:
    """MLflow's form of the signature; None where a type (bfloat16) has no NumPy form."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    if any(tensor.dtype not in rows.NUMPY_OF for tensor in (*signature.inputs, *signature.outputs)):
        return None

    def schema(tensors: Sequence[Tensor]) -> Any:
        specs = []
        for tensor in tensors:
            dtype = np.dtype("str" if tensor.dtype == "BYTES" else rows.NUMPY_OF[tensor.dtype])
            specs.append(TensorSpec(dtype, tensor.shape or (-1,), tensor.name))
        return Schema(specs)

    return ModelSignature(inputs=schema(signature.inputs), outputs=schema(signature.outputs))


def _example(signature: Signature, expected: Path | None) -> dict[str, Any] | None:
    """One row: the first of the expected ones, else zeros and empty strings."""
    import numpy as np

    if any(tensor.dtype not in rows.NUMPY_OF for tensor in signature.inputs):
        return None
    if expected is not None:
        table = rows.read(expected, limit=1, text=rows.text_inputs(signature))
        return rows.feeds(table, signature, expected)
    made: dict[str, Any] = {}
    for tensor in signature.inputs:
        shape = tuple(max(1, size) for size in tensor.shape)
        made[tensor.name] = (
            np.full(shape, "", dtype=object)
            if tensor.dtype == "BYTES"
            else np.zeros(shape, rows.NUMPY_OF[tensor.dtype])
        )
    return made
