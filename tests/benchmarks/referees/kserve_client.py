"""KServe's own client on our server. Run by bench_serving in that environment: URL FILE. Prints JSON: what holds.

The answers are compared with ONNX Runtime's on the same rows, by KServe's own readers of answers.
"""

import asyncio
import json
import sys

import httpx
import numpy as np
import onnxruntime as ort
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def main(url, path):
    rows = np.random.default_rng(5).normal(size=(7, 25)).astype(np.float32)
    label, chances = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"X": rows})
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    held = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model ready": await client.is_model_ready(url, "m"),
    }
    for binary in (False, True):
        given = InferInput("X", list(rows.shape), "FP32")
        given.set_data_from_numpy(rows, binary_data=binary)
        asked = InferRequest("m", [given], request_id="r-1", parameters={"binary_data_output": binary})
        headers = {}
        answer = await client.infer(url, asked, model_name="m", response_headers=headers)
        raw = "inference-header-content-length" in {name.lower() for name in headers}
        found = {output.name: output.as_numpy() for output in answer.outputs}
        same = np.array_equal(found["label"], label) and np.allclose(found["probabilities"], chances, atol=1e-6)
        held[f"infer, {'raw tensors' if binary else 'JSON'}"] = bool(same and raw == binary and answer.id == "r-1")
    wrong = {"inputs": [{"name": "X", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
    for what, model, words, status in (
        ("error of the contract", "m", "input 'X': expected shape", 400),
        ("another model", "other", "is not served here", 404),
    ):
        try:
            await client.infer(url, wrong, model_name=model)
            held[what] = False
        except httpx.HTTPStatusError as exc:
            held[what] = words in str(exc) and exc.response.status_code == status
    older = InferenceRESTClient(RESTConfig(protocol="v1", retries=0))
    answer = await older.infer(url, {"instances": rows.tolist()}, model_name="m")
    held["infer, v1"] = np.allclose([row["probabilities"] for row in answer["predictions"]], chances, atol=1e-6)
    held["model ready, v1"] = await older.is_model_ready(url, "m")
    print(json.dumps(held))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
