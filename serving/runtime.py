"""ONNX Runtime, silent. Its builds from 1.29 on send what they run (hashes and names of models) to their maker.

To be imported in place of `onnxruntime`, and in functions: it takes a while.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when the library is loaded

import onnxruntime as ort

__all__ = ["ort"]
