"""One model version as a server process: `python -m serving.server --model NAME --path FILE.onnx ...`.

Loads the bytes it was told to, listens, and on SIGTERM (or SIGINT) finishes what it accepted and leaves.
Exit codes: 0 left in good order, 2 wrong usage, 3 cannot serve (one sentence on stderr), 4 cut off accepted requests.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence

import uvloop

from serving.batching import Batcher, Predictor
from serving.connection import Host
from serving.endpoints import Endpoints
from serving.errors import CannotServe
from serving.listening import closed_first, free
from serving.log import complain, say
from serving.metrics import Metrics
from serving.model import Model, Signature
from serving.protocol import Identity
from serving.samples import Samples
from serving.settings import Settings, from_arguments

_BACKLOG = 1024
_SWEEP_S = 0.5
_SWITCH_S = 0.0005  # how long the thread that writes samples may keep the event loop waiting; Python's own is 5 ms


class Server:
    """The parts of one server, joined. `run` serves until it is told to leave."""

    def __init__(self, settings: Settings, model: Model, loop: asyncio.AbstractEventLoop) -> None:
        if not settings.batching:
            model.forbid_batching()
        self._settings = settings
        self._loop = loop
        self._leave = asyncio.Event()
        epoch = secrets.token_hex(8)
        self.metrics = Metrics(settings.model, settings.version, epoch)
        self._samples: Samples | None = None
        if settings.samples is not None:
            self._samples = Samples(settings.samples, model.signature.inputs, epoch, self.metrics)
        predictor = predictor_for(model.signature, settings.prediction_output, settings.prediction_column)
        self._batcher = Batcher(loop, model, settings.limits, self.metrics, predictor, self._samples)
        who = Identity(settings.model, settings.version, model.signature)
        endpoints = Endpoints(who, self._batcher, self.metrics, settings.http.body_max)
        self._host = Host(settings.http, endpoints.handle, endpoints.refuse)

    async def run(self, started: float) -> int:
        """Serves until SIGTERM or SIGINT; the exit code. Raises CannotServe when the address is taken."""
        listener = await self._listen()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._leave.set)
        if self._samples is not None:
            self._start_samples(self._samples)
        gc.collect()
        gc.freeze()  # what was loaded stays; the collector need not look at it again
        self.metrics.ready = True
        took_ms = (time.perf_counter() - started) * 1000
        who = f"{self._settings.model} version {self._settings.version}"
        say(f"serving {who} at {self.address(listener)} (ready in {took_ms:.0f} ms)")
        sweeper = self._loop.create_task(self._sweep())
        await self._leave.wait()
        code = await self._drain(listener)
        sweeper.cancel()
        return code

    def address(self, listener: asyncio.Server) -> str:
        """Where the server listens, as a URL."""
        if self._settings.uds is not None:
            return f"unix:{self._settings.uds}"
        host, port = listener.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    async def _listen(self) -> asyncio.Server:
        settings = self._settings
        try:
            if settings.uds is None:
                return await self._loop.create_server(
                    self._host.connect, settings.host, settings.port, backlog=_BACKLOG, reuse_address=True
                )
            free(settings.uds)
            listening = closed_first(settings.uds)
            listener = await self._loop.create_unix_server(self._host.connect, sock=listening, backlog=_BACKLOG)
            settings.uds.chmod(0o600)
        except OSError as exc:
            where = settings.uds or f"{settings.host}:{settings.port}"
            raise CannotServe(f"cannot listen on {where}: {exc.strerror or exc}") from exc
        return listener

    def _start_samples(self, samples: Samples) -> None:
        try:
            samples.start()
        except OSError as exc:
            assert self._settings.samples is not None
            raise CannotServe(f"cannot keep samples in '{self._settings.samples.folder}': {exc.strerror}") from exc

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._host.sweep()
            self._batcher.expire()
            hangs = self._batcher.hangs
            if hangs and self.metrics.ready:
                complain(
                    f"a run has lasted {self._settings.limits.run_s:g} s longer than it may: not ready until it ends"
                )
            self.metrics.ready = not hangs and not self._host.draining

    async def _drain(self, listener: asyncio.Server) -> int:
        """Finishes what was accepted. New connections are refused; an answer on an old one closes it."""
        settings = self._settings
        self.metrics.ready = False
        self._host.draining = True
        await asyncio.sleep(0.02)  # who connected before the signal is still let in from the kernel's queue
        listener.close()
        deadline = self._loop.time() + settings.drain_s
        linger = self._loop.time() + settings.linger_s
        while self._host.connections and self._loop.time() < deadline:
            if self._loop.time() >= linger:
                self._host.close_idle()
            await asyncio.sleep(0.01)
        cut_off = len(self._host.connections)
        self._batcher.close()
        if self._samples is not None:
            await self._loop.run_in_executor(None, self._samples.stop)
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)
        if cut_off:
            complain(f"{cut_off} connections were cut off after {settings.drain_s:g} s of draining")
            return 4
        return 0


def predictor_for(signature: Signature, output: str | None, column: int) -> Predictor:
    """Which number is *the* prediction: `column` of `output`, by default of the last float output, else of the last
    numeric one. Raises CannotServe for an output that the model does not have."""
    names = [spec.name for spec in signature.outputs]
    if output is not None:
        if output not in names:
            raise CannotServe(f"the model has no output '{output}'; it has {', '.join(names)}")
        if signature.outputs[names.index(output)].datatype.name == "BYTES":
            raise CannotServe(f"output '{output}' holds strings, which are no prediction to be counted")
        return Predictor(names.index(output), column)
    for kinds in ("f", "iub"):
        for at in range(len(names) - 1, -1, -1):
            if signature.outputs[at].datatype.numpy.kind in kinds:
                return Predictor(at, column)
    return Predictor(None)


def serve(settings: Settings) -> int:
    """Loads and serves; the exit code."""
    started = time.perf_counter()
    try:
        model = Model.load(settings.path, settings.digest, settings.session, settings.proof)
        gc.set_threshold(20_000, 20, 50)
        sys.setswitchinterval(_SWITCH_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, model, started))
    except CannotServe as exc:
        complain(str(exc))
        return 3


async def _serve(settings: Settings, model: Model, started: float) -> int:
    return await Server(settings, model, asyncio.get_running_loop()).run(started)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `lockgate serve` calls it too."""
    return serve(from_arguments(argv))


if __name__ == "__main__":
    code = main()
    # A model that hangs in the worker thread must not keep the process: what was accepted is answered or given up.
    os._exit(code)
