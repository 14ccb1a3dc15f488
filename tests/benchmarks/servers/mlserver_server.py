"""The model behind MLServer. Run by bench_serving in the peer's own environment: FILE PORT."""

import asyncio
import sys

import onnxruntime as ort
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class OnnxModel(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        given = self.session.run(None, {"X": NumpyCodec.decode_input(payload.inputs[0])})
        names = ("label", "probabilities")
        outputs = [NumpyCodec.encode_output(name, values) for name, values in zip(names, given, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def main():
    port = int(sys.argv[2])
    # No worker processes: on one core they only add a hop.
    settings = Settings(http_port=port, grpc_port=port + 1, metrics_port=port + 2, parallel_workers=0, debug=False)
    await MLServer(settings).start([ModelSettings(name="m", implementation=OnnxModel)])


if __name__ == "__main__":
    asyncio.run(main())
