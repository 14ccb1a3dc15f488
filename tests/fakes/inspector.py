"""A fake Inspector: a "model" is any file that begins with `MODEL`; all have the signature it was made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.ports import BadInput, Refused, Signature, Tensor

MODEL = b"fake-onnx:"
SIGNATURE = Signature(inputs=(Tensor("x", "FP32", (-1, 2)),), outputs=(Tensor("p", "FP32", (-1, 1)),))


class FakeInspector:
    """`tasks.ports.Inspector` without ONNX."""

    def __init__(self, signature: Signature = SIGNATURE) -> None:
        self._signature = signature

    def signed(self, onnx: Path, signature: str, keys: Sequence[str]) -> None:
        """A signature is the key that made it, and the file's first bytes."""
        if not any(signature == key + onnx.read_bytes()[:20].decode() for key in keys):
            raise Refused("the signature is by none of the keys")

    def signature(self, onnx: Path) -> Signature:
        """What it was made with. Raises BadInput for a file that is not there or does not begin with `MODEL`."""
        if not onnx.is_file():
            raise BadInput(f"{onnx}: no such file")
        if not onnx.read_bytes().startswith(MODEL):
            raise BadInput(f"{onnx}: not an ONNX model")
        return self._signature
