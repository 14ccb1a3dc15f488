"""The model server beside its peers, on the same model and one core: `python -m tests.benchmarks.bench_serving`.

Each peer is installed in an environment of its own under build/peers, started on core 0 beside ours, and driven by
`wrk` (core 1) in turn with ours, several rounds; a ratio is that of one round, and the median over the rounds is
reported. Where it is allowed (root), servers and `wrk` run as real-time processes of one priority: any other process,
however nice, may hold a core for a scheduler's slice (4 ms), which costs him most who answers fastest. Bodies rotate: a
CPU learns a repeated one. Ours runs with metrics, sampling, checks and admission switched on. ONNX Runtime's own rate
is a bare loop over `run` on the same core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import psutil

from serving.zygote import Zygote

ROOT = Path(__file__).parents[2]
SERVERS = Path(__file__).parent / "servers"
PEERS = {"kserve": "kserve==0.21.0", "mlserver": "mlserver==1.7.1", "litserve": "litserve==0.2.19"}
PEERS["mlflow"] = "mlflow==3.17.2"
PATHS = {"litserve": "/predict", "mlflow": "/invocations"}
OIP = "/v2/models/m/infer"
COLUMNS, BODIES = 25, 64
SERVER_CORE, CLIENT_CORE = 0, 1
REAL_TIME = os.geteuid() == 0
CASES = {"batch 1, 1 connection": (1, 1), "batch 1, 16 connections": (1, 16), "batch 32, 16 connections": (32, 16)}


# --- what is driven -------------------------------------------------------------------------------------------------


def make_model(path: Path, depth: int) -> None:
    """Gradient boosting, 100 trees on 25 features: of depth 3 (scikit-learn's default) or 6 (XGBoost's)."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import GradientBoostingClassifier

    chance = np.random.default_rng(0)
    rows = chance.normal(size=(4000, COLUMNS)).astype(np.float32)
    label = rows[:, 0] + rows[:, 1] * rows[:, 2] + chance.normal(size=4000) > 0
    fitted = GradientBoostingClassifier(n_estimators=100, max_depth=depth).fit(rows, label)
    made = to_onnx(fitted, rows[:1], options={id(fitted): {"zipmap": False}}, target_opset=17)
    path.write_bytes(made.SerializeToString())


def write_script(path: Path, rows: int, form: str) -> Path:
    """A wrk script that sends `BODIES` different bodies in turn; `form` is oip, binary or inputs."""
    chance = np.random.default_rng(rows)
    lines = ['wrk.method = "POST"', 'wrk.headers["Content-Type"] = "application/json"', "local bodies = {}"]
    for at in range(BODIES):
        values = chance.normal(size=(rows, COLUMNS)).astype(np.float32).round(4)
        tensor: dict[str, Any] = {"name": "X", "shape": [rows, COLUMNS], "datatype": "FP32"}
        raw = b""
        if form == "inputs":
            asked: dict[str, Any] = {"inputs": values.astype(float).round(4).tolist()}
        elif form == "oip":
            asked = {"inputs": [{**tensor, "data": values.reshape(-1).astype(float).round(4).tolist()}]}
        else:
            raw = values.tobytes()
            asked = {"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}]}
            asked["parameters"] = {"binary_data_output": True}
        head = json.dumps(asked).encode()
        if raw:
            lines.append(f'wrk.headers["Inference-Header-Content-Length"] = "{len(head)}"')
        escaped = "".join(f"\\x{byte:02x}" for byte in head + raw)
        lines.append(f'bodies[{at + 1}] = "{escaped}"')
    lines.append("local at = 0")
    lines.append(f"request = function() at = at % {BODIES} + 1; return wrk.format(nil, nil, nil, bodies[at]) end")
    path.write_text("\n".join(lines))
    return path


def on_core(core: int) -> list[str]:
    """What stands before a command that is to have the core for itself, as far as this user may ask for it."""
    return [*(["chrt", "--rr", "1"] if REAL_TIME else []), "taskset", "-c", str(core)]


def wrk(url: str, connections: int, seconds: int, script: Path) -> dict[str, float]:
    """Requests per second and p50/p99 in ms. Raises RuntimeError when an answer was not 2xx or 3xx."""
    command = [*on_core(CLIENT_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    done = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in done or "Socket errors" in done:
        raise RuntimeError(f"{url} did not answer every request:\n{done}")
    found = {"rps": float(re.search(r"Requests/sec:\s+([\d.]+)", done)[1])}  # type: ignore[index]
    for name, share in (("p50_ms", "50"), ("p99_ms", "99")):
        value, unit = re.search(rf"{share}%\s+([\d.]+)(us|ms|s)", done).groups()  # type: ignore[union-attr]
        found[name] = float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]
    return found


# --- who is driven --------------------------------------------------------------------------------------------------


def python_of(peer: str) -> Path:
    """The peer's own Python, installed on first use."""
    folder = ROOT / "build" / "peers" / peer
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        uv = str(Path(sys.executable).parent / "uv")
        print(f"installing {PEERS[peer]} ...", flush=True)
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
        wanted = [PEERS[peer], f"onnxruntime=={onnxruntime.__version__}", "numpy", "onnx"]
        subprocess.run([uv, "pip", "install", "-q", "-p", str(python), *wanted], check=True)
        (folder / "installed").touch()
    return python


@contextlib.contextmanager
def started(command: list[str], port: int, folder: Path, log: Path) -> Iterator[psutil.Process]:
    """The server on its core, listening; ended with its children afterwards."""
    with log.open("wb") as output:
        process = psutil.Popen([*on_core(SERVER_CORE), *command], cwd=folder, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve; see {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield process
    finally:
        family = [process]
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [*process.children(recursive=True), process]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        for one in psutil.wait_procs(family, timeout=10)[1]:
            one.kill()


def kserve_s_client(model: Path, folder: Path) -> dict[str, bool]:
    """What KServe's own client finds on our server, each with whether it is right."""
    port = free_port()
    script = str(Path(__file__).parent / "referees" / "kserve_client.py")
    with started(ours(model, folder / "samples", port), port, ROOT, folder / "ours.log"):
        command = [str(python_of("kserve")), script, f"http://127.0.0.1:{port}", str(model)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return dict(json.loads(done.stdout))


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that nobody has, with the two after it left to peers that want more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours(model: Path, samples: Path, port: int) -> list[str]:
    """Our command line, everything switched on."""
    command = [sys.executable, "-m", "serving.server", "--model", "m", "--path", str(model), "--port", str(port)]
    return [*command, "--samples", str(samples)]


# --- the comparisons ------------------------------------------------------------------------------------------------


def beside_peer(peer: str, model: Path, folder: Path, rounds: int, seconds: int) -> dict[str, Any]:
    """Ours and the peer in turn, over the cases: rates of each round, and the median of their ratios."""
    form = "inputs" if peer in PATHS else "oip"
    our_port, peer_port = free_port(), free_port()
    command = [str(python_of(peer)), str(SERVERS / f"{peer}_server.py"), str(model), str(peer_port)]
    found: dict[str, Any] = {}
    with (
        started(ours(model, folder / "samples", our_port), our_port, ROOT, folder / "ours.log"),
        started(command, peer_port, folder, folder / f"{peer}.log"),
    ):
        for case, (rows, connections) in CASES.items():
            our_script = write_script(folder / f"oip-{rows}.lua", rows, "oip")
            peer_script = write_script(folder / f"{form}-{rows}.lua", rows, form)
            our_url = f"http://127.0.0.1:{our_port}{OIP}"
            peer_url = f"http://127.0.0.1:{peer_port}{PATHS.get(peer, OIP)}"
            wait_until_answered(peer_url, connections, peer_script)
            pairs = []
            for _ in range(rounds):
                our_rate = wrk(our_url, connections, seconds, our_script)
                pairs.append((our_rate, wrk(peer_url, connections, seconds, peer_script)))
            found[case] = {
                "ours": [one for one, _ in pairs],
                "peer": [other for _, other in pairs],
                "ratio": statistics.median(one["rps"] / other["rps"] for one, other in pairs),
            }
            show(f"{peer:9} {case:25}", pairs, found[case]["ratio"])
    return found


def wait_until_answered(url: str, connections: int, script: Path) -> None:
    """A warm-up; a peer that listens may still be loading its model."""
    deadline = time.monotonic() + 60
    while True:
        try:
            wrk(url, connections, 1, script)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
        else:
            return


def show(what: str, pairs: list[tuple[dict[str, float], dict[str, float]]], ratio: float) -> None:
    """One line of the table."""
    mine, theirs = (statistics.median(pair[side]["rps"] for pair in pairs) for side in (0, 1))
    print(f"{what} ours {mine:9.0f}/s   other {theirs:9.0f}/s   ratio {ratio:6.2f}", flush=True)


RUNTIME_LOOP = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
bodies = [{"X": np.random.default_rng(at).normal(size=(32, 25)).astype(np.float32)} for at in range(64)]
for body in bodies * 4:
    session.run(names, body)
runs, start = 0, time.perf_counter()
while time.perf_counter() - start < float(sys.argv[2]):
    for body in bodies:
        session.run(names, body)
    runs += len(bodies)
print(runs / (time.perf_counter() - start))
"""


def beside_runtime(model: Path, folder: Path, rounds: int, seconds: int) -> dict[str, Any]:
    """Batch 32 at 64 connections, JSON and raw tensors, beside ONNX Runtime's bare rate; in turn."""
    port = free_port()
    scripts = {form: write_script(folder / f"{form}-32.lua", 32, form) for form in ("oip", "binary")}
    bare = [*on_core(SERVER_CORE), sys.executable, "-c", RUNTIME_LOOP, str(model), str(seconds)]
    found: dict[str, Any] = {}
    print(f"bare ONNX Runtime, {model.stem}:", flush=True)
    with started(ours(model, folder / "samples", port), port, ROOT, folder / "ours.log"):
        for form, script in scripts.items():
            wrk(f"http://127.0.0.1:{port}{OIP}", 64, 1, script)
            pairs = []
            for _ in range(rounds):
                rate = wrk(f"http://127.0.0.1:{port}{OIP}", 64, seconds, script)
                done = subprocess.run(bare, capture_output=True, text=True, check=True)
                pairs.append((rate, {"rps": float(done.stdout)}))
            ratio = statistics.median(one["rps"] / other["rps"] for one, other in pairs)
            found[form] = {"ours": [one for one, _ in pairs], "runtime": [two for _, two in pairs], "ratio": ratio}
            show(f"runtime   batch 32 {form:16}", pairs, ratio)
    return found


def starts(model: Path, folder: Path, count: int = 7) -> dict[str, Any]:
    """Start to ready, and private memory, of further versions from the zygote."""
    place = folder / "zygote.sock"
    command = [sys.executable, "-m", "serving.zygote", "--uds", str(place)]
    zygote = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert zygote.stdout is not None
    zygote.stdout.readline()
    took_ms, private_mb, pids = [], [], []
    try:
        for at in range(count):
            uds = folder / f"v{at}.sock"
            argv = ["--model", "m", "--version", str(at), "--path", str(model), "--uds", str(uds)]
            start = time.perf_counter()
            pids.append(Zygote(place).spawn([*argv, "--samples", str(folder / f"s{at}")], folder / "zygote.log"))
            while not ready(uds):
                if time.perf_counter() - start > 30:
                    raise RuntimeError(f"no version within 30 s: {(folder / 'zygote.log').read_text()}")
                time.sleep(0.001)
            took_ms.append((time.perf_counter() - start) * 1000)
            text = Path(f"/proc/{pids[-1]}/smaps_rollup").read_text()
            private_mb.append(sum(map(int, re.findall(r"Private_\w+:\s+(\d+)", text))) / 1024)
    finally:
        for pid in pids:
            psutil.Process(pid).terminate()
        zygote.terminate()
        zygote.wait(10)
    return {"ready_ms": took_ms, "private_mb": private_mb}


SOAK = """
local at = 0
request = function()
  at = at + 1
  local headers = {["Content-Type"] = "application/json", ["x-request-id"] = "soak-" .. at}
  if at % 50 == 0 then return wrk.format("POST", "/nothing/" .. at, headers, "") end
  if at % 50 == 10 then return wrk.format(nil, nil, headers, "not json " .. at) end
  if at % 50 == 20 then return wrk.format(nil, nil, headers, bodies[at % 64 + 1]:sub(1, at % 200)) end
  if at % 50 == 30 then return wrk.format(nil, "/v1/models/m:predict", headers, '{"instances": [[' .. at .. ']]}') end
  return wrk.format(nil, nil, headers, bodies[at % 64 + 1])
end
"""


def soak(model: Path, folder: Path, requests: int) -> dict[str, Any]:
    """So many requests, good and bad, each with an id of its own: resident MB as they go on, and grown in their second
    half. In the first one the room for samples fills up to its bound, whenever their writer comes late."""
    port, script = free_port(), write_script(folder / "soak.lua", 1, "oip")
    script.write_text(script.read_text() + SOAK)
    url, seen = f"http://127.0.0.1:{port}", []
    command = [*on_core(CLIENT_CORE), "wrk", "-t1", "-c16", "-d3s", "-s", str(script), f"{url}{OIP}"]
    with started(
        [*ours(model, folder / "soaked", port), "--samples-max-mb", "8"], port, ROOT, folder / "ours.log"
    ) as p:
        while not seen or seen[-1][0] < requests:
            subprocess.run(command, capture_output=True, check=True)
            text = httpx.get(f"{url}/metrics").text
            counts = re.findall(r'lockgate_requests_total\{[^}]*code="(\d+)"\} (\d+)', text)
            assert not [code for code, count in counts if int(code) >= 500 and int(count)], text
            seen.append((sum(int(count) for _, count in counts), p.memory_info().rss / 2**20))
    warm = [mb for count, mb in seen if count >= requests / 2]
    print(f"soak      {seen[-1][0]} requests   {' '.join(f'{mb:.1f}' for _, mb in seen)} MB", flush=True)
    return {"requests": seen[-1][0], "resident_mb": [mb for _, mb in seen], "grown_mb": warm[-1] - warm[0]}


def ready(uds: Path) -> bool:
    """Whether the server on the socket says so itself."""
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(str(uds))
        except OSError:
            return False
        peer.sendall(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n")
        return b" 200 " in peer.recv(4096)


# --- the result -----------------------------------------------------------------------------------------------------


def checks_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of issue and design, each with what was measured."""
    checks = []

    def check(what: str, value: float, bar: float, holds: Callable[[float, float], bool], sign: str) -> None:
        checks.append({"what": what, "value": round(value, 3), "bar": f"{sign} {bar:g}", "holds": holds(value, bar)})

    better = [raw["peers"][peer] for peer in ("kserve", "mlserver") if peer in raw["peers"]]
    bars = {"batch 1, 16 connections": 10, "batch 1, 1 connection": 5, "batch 32, 16 connections": 4}
    for case, bar in bars.items():
        if better:
            lowest = min(peer[case]["ratio"] for peer in better)
            check(f"rate / the better of KServe and MLServer, {case}", lowest, bar, float.__ge__, ">=")
    for depth, found in raw["runtime"].items():
        what = f"rate / ONNX Runtime's own, trees of {depth}, batch 32"
        check(f"{what} JSON", found["oip"]["ratio"], 0.5, float.__ge__, ">=")
        check(f"{what} binary", found["binary"]["ratio"], 0.75, float.__ge__, ">=")
    for what, right in raw["kserve_client"].items():
        check(f"KServe's client: {what}", float(right), 1.0, float.__ge__, ">=")
    if "soak" in raw:
        what = f"memory grown in the second half of {raw['soak']['requests']} requests, good and bad, MB"
        check(what, raw["soak"]["grown_mb"], 4.0, float.__le__, "<=")
    took, private = (statistics.median(raw["starts"][name]) for name in ("ready_ms", "private_mb"))
    check("start to ready from the zygote, ms (median)", took, 100.0, float.__le__, "<=")
    check("private memory per further version, MB (median)", private, 20.0, float.__le__, "<=")
    return checks


def main() -> int:
    """Measures, prints the table, writes the JSON; 1 if a bar does not hold."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--seconds", type=int, default=4, help="per measurement; wrk knows whole ones only")
    asked.add_argument("--peers", default=",".join(PEERS), help="comma-separated; default: %(default)s")
    half_an_hour = 1800 * 1000  # requests of a busy server
    asked.add_argument("--soak", type=int, default=half_an_hour, help="requests of the long run; default: %(default)s")
    asked.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks" / "serving.json")
    given = asked.parse_args()
    if shutil.which("wrk") is None:
        asked.error("wrk is not installed (on Debian and Ubuntu: apt-get install wrk)")
    raw: dict[str, Any] = {"peers": {}, "load_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "depth 3.onnx"
        for depth in (3, 6):
            make_model(folder / f"depth {depth}.onnx", depth)
        raw["kserve_client"] = kserve_s_client(model, folder) if given.peers else {}
        raw["starts"] = starts(model, folder)
        raw["runtime"] = {
            path.stem: beside_runtime(path, folder, given.rounds, given.seconds) for path in folder.glob("depth*.onnx")
        }
        for peer in filter(None, given.peers.split(",")):
            raw["peers"][peer] = beside_peer(peer, model, folder, given.rounds, given.seconds)
        if given.soak:
            raw["soak"] = soak(model, folder, given.soak)
    raw["load_after"] = os.getloadavg()
    checks = checks_of(raw)
    machine = {"cores": os.cpu_count(), "cpu": cpu_name(), "python": platform.python_version()}
    machine |= {"onnxruntime": onnxruntime.__version__, "real_time": REAL_TIME}
    for one in checks:
        print(f"{'holds' if one['holds'] else 'FAILS':6} {one['what']:60} {one['value']:10} (bar {one['bar']})")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"checks": checks, "machine": machine, "raw": raw}, indent=1))
    return 0 if all(one["holds"] for one in checks) else 1


def cpu_name() -> str:
    """What the machine calls its processor."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
