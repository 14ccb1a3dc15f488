"""The model behind MLflow's own server. Run by bench_serving in the peer's own environment: FILE PORT."""

import os
import shutil
import sys
import tempfile

import mlflow.onnx
import onnx

if __name__ == "__main__":
    folder = os.path.join(tempfile.mkdtemp(), "model")  # noqa: PTH118 - no pathlib needed for one join
    mlflow.onnx.save_model(onnx.load(sys.argv[1]), folder, onnx_session_options={"intra_op_num_threads": 1})
    command = [shutil.which("mlflow", path=os.path.dirname(sys.executable)), "models", "serve", "-m", folder]  # noqa: PTH120
    os.execv(command[0], [*command, "-h", "127.0.0.1", "-p", sys.argv[2], "--env-manager", "local", "--workers", "1"])
