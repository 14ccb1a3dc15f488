"""The model behind the KServe SDK. Run by bench_serving in the peer's own environment: FILE PORT."""

import sys

import kserve
import onnxruntime as ort


class OnnxModel(kserve.Model):
    def __init__(self, path):
        super().__init__("m")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        given = self.session.run(None, {"X": payload.inputs[0].as_numpy()})
        outputs = []
        for name, datatype, values in zip(("label", "probabilities"), ("INT64", "FP32"), given, strict=True):
            output = kserve.InferOutput(name, list(values.shape), datatype)
            output.set_data_from_numpy(values, binary_data=False)
            outputs.append(output)
        return kserve.InferResponse(response_id=payload.id or "none", model_name=self.name, infer_outputs=outputs)


if __name__ == "__main__":
    kserve.ModelServer(http_port=int(sys.argv[2]), workers=1, enable_grpc=False, access_log_format=None).start(
        [OnnxModel(sys.argv[1])]
    )
