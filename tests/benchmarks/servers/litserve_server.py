"""The model behind LitServe. Run by bench_serving in the peer's own environment: FILE PORT."""

import sys

import litserve
import numpy as np
import onnxruntime as ort


class OnnxApi(litserve.LitAPI):
    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        return np.array(request["inputs"], dtype=np.float32)

    def predict(self, rows):
        return self.session.run(None, {"X": rows})

    def encode_response(self, given):
        return {"label": given[0].tolist(), "probabilities": given[1].tolist()}


if __name__ == "__main__":
    litserve.LitServer(OnnxApi(), accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error"
    )
