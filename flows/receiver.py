"""The trigger receiver: takes MLflow's hints, and looks at the registry at each of them and every few seconds besides.

A hint is answered at once; it only wakes the watcher, who acts on what stands in the registry. `/metrics` counts hints
by what became of them, and says when the registry was last looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from flows.settings import Settings
from flows.wiring import Doorkeeper, Unbelievable, announce, configure, hint_secret, located, subscribe
from serving.log import say
from tasks.ports import PortError

_BODY_BYTES_MAX = 65_536
_SOON_S = 1.0
_FRESH = 3.0  # polls without a look, and the watcher is not well
_REFUSED = {"forged": 401, "stale": 401, "replayed": 409, "malformed": 400}


@dataclass
class Metrics:
    """What the receiver counts."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.hints = Counter("lockgate_hints", "Hints of the registry.", ["result"], registry=self.registry)
        for result in ("accepted", *_REFUSED):
            self.hints.labels(result)
        self.runs = Counter("lockgate_triggered", "Deliveries started for the registry.", registry=self.registry)
        self.errors = Counter("lockgate_look_errors", "Looks that could not be finished.", registry=self.registry)
        self.looked = Gauge("lockgate_looked_seconds", "When the registry was last looked at.", registry=self.registry)


class Watcher:
    """Looks at the registry whenever it is woken, and every `poll_s` seconds."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.woken = threading.Event()
        self.thread = threading.Thread(target=self._work, name="watcher", daemon=True)
        self.looked_at = 0.0  # POSIX seconds
        self._left: dict[str, str] = {}

    def _work(self) -> None:
        try:
            self._subscribe()
            while True:
                self.woken.clear()
                self.woken.wait(self._look())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a receiver that does not look is to be started anew

    def _subscribe(self) -> None:
        """Asks for hints; without them the polls find everything, later."""
        if self.settings.mlflow_url is not None:
            _say("the registry is elsewhere: it is polled")
            return
        try:
            subscribe(self.settings)
        except PortError as exc:
            _say(f"no hints, the registry is only polled: {exc}")

    def _look(self) -> float:
        """Looks; in how many seconds to look again. Prefect's SQLite is busy for a moment now and then, and says no."""
        from flows.runs import look_at_registry  # this process has been told by now where Prefect is

        try:
            seen = look_at_registry(self.settings)
        except PortError as exc:
            self.metrics.errors.inc()
            self._tell_left({"look": str(exc)})
            return self.settings.registry_poll_s
        self.looked_at = time.time()
        self.metrics.looked.set(self.looked_at)
        self.metrics.runs.inc(len(seen.started))
        for line in seen.started:
            _say(f"started: {line}")
        self._tell_left(seen.left)
        return min(_SOON_S, self.settings.registry_poll_s) if seen.soon else self.settings.registry_poll_s

    def _tell_left(self, left: dict[str, str]) -> None:
        for what, why in left.items():
            if self._left.get(what) != why:  # once, not at every look
                _say(f"{what}: {why}")
        self._left = left


def application(doorkeeper: Doorkeeper, watcher: Watcher, metrics: Metrics) -> web.Application:
    """The receiver's HTTP side."""

    async def hint(request: web.Request) -> web.Response:
        body = await request.read()
        try:
            doorkeeper.believe(request.headers, body, time.time())
        except Unbelievable as exc:
            metrics.hints.labels(exc.why).inc()
            return web.json_response({"refused": exc.why}, status=_REFUSED[exc.why])
        metrics.hints.labels("accepted").inc()
        watcher.woken.set()
        return web.json_response({}, status=202)

    async def health(_request: web.Request) -> web.Response:
        age = time.time() - watcher.looked_at
        well = age < _FRESH * watcher.settings.registry_poll_s
        return web.json_response({"looked_seconds_ago": round(age, 1)}, status=200 if well else 503)

    async def counts(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), content_type="text/plain")

    made = web.Application(client_max_size=_BODY_BYTES_MAX)
    made.add_routes([web.post("/hints", hint), web.get("/health", health), web.get("/metrics", counts)])
    return made


def _say(line: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {line}")


async def _serve(settings: Settings) -> None:
    metrics = Metrics()
    watcher = Watcher(settings, metrics)
    doorkeeper = Doorkeeper(hint_secret(settings), time.time())
    runner = web.AppRunner(application(doorkeeper, watcher, metrics), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", located(settings).trigger_port).start()
    watcher.thread.start()
    announce(settings, "flows.receiver")
    here = asyncio.current_task()
    assert here is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    await runner.cleanup()


if __name__ == "__main__":
    configure()
    asyncio.run(_serve(Settings()))
