"""The model behind MLflow's own server. Run by bench_serving in the peer's own environment: FILE PORT."""

import os
import sys
import tempfile
from pathlib import Path

import mlflow.onnx
import onnx

if __name__ == "__main__":
    folder = str(Path(tempfile.mkdtemp()) / "model")
    mlflow.onnx.save_model(onnx.load(sys.argv[1]), folder, onnx_session_options={"intra_op_num_threads": 1})
    own = Path(sys.executable).parent
    os.environ["PATH"] = f"{own}:{os.environ['PATH']}"  # it starts uvicorn by its name
    command = [str(own / "mlflow"), "models", "serve", "-m", folder, "-h", "127.0.0.1", "-p", sys.argv[2]]
    os.execv(command[0], [*command, "--env-manager", "local", "--workers", "1"])
