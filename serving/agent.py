"""The node agent: runs Envoy and the model servers of one machine, holds the routes durably, and enforces leases.

    python -m serving.agent --home DIR [--gateway-host H] [--gateway-port P]

Killed with SIGKILL it leaves Envoy and the servers running, and takes them over when it is started again. SIGTERM
drains and ends all of them. What it does is in `node.py`, its API in `agent_api.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from policies.evidence import LATENCY_EDGES_MS
from serving import gateway
from serving.agent_api import listen
from serving.agent_errors import StartError
from serving.durable import write_durably
from serving.node import Agent, AgentSettings

SOCKET_PATH_MAX = 100  # the system's limit is 107 bytes


def lock_home(home: Path) -> int:
    """Makes this process the only agent of the home until it ends. Raises StartError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home / "agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise StartError(f"the home {home} cannot be used: {exc.strerror}") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        pid = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise StartError(f"another agent (pid {pid}) already runs on {home}; stop it or choose another --home") from exc
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, and does not tell whose it is
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def token_of(home: Path) -> str:
    """The secret that a request must carry; made at the first start, readable by the owner only."""
    path = home / "agent.token"
    if not path.exists():
        write_durably(path, secrets.token_urlsafe(32).encode())
    return path.read_text().strip()


async def serve(settings: AgentSettings) -> None:
    """Runs the agent until SIGTERM or SIGINT. Raises StartError."""
    if len(str(settings.home / "run" / "0123456789ab.sock")) > SOCKET_PATH_MAX:
        raise StartError(f"the path of the home is too long for Unix sockets: {settings.home}; choose a shorter --home")
    lock = lock_home(settings.home)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    agent = Agent(settings)
    try:
        await agent.begin()
        runner = await listen(agent, settings.home / "agent.sock", token_of(settings.home))
        await stop.wait()
        await runner.cleanup()
    finally:
        await agent.stop()
        os.close(lock)


def _parse(arguments: Sequence[str] | None) -> AgentSettings:
    defaults = gateway.GatewaySettings()
    parser = argparse.ArgumentParser(prog="python -m serving.agent", description="The lockgate node agent.")
    parser.add_argument("--home", type=Path, required=True, help="where its state, models, samples and logs are kept")
    parser.add_argument("--gateway-host", default=defaults.host)
    parser.add_argument("--gateway-port", type=int, default=defaults.port)
    parser.add_argument("--gateway-threads", type=int, default=1)
    parser.add_argument("--request-timeout-s", type=float, default=defaults.request_timeout_s)
    parser.add_argument("--attempt-timeout-s", type=float, default=defaults.attempt_timeout_s)
    parser.add_argument("--requests-max", type=int, default=defaults.requests_max, help="under way on one version")
    parser.add_argument("--access-log", action="store_true", help="a line of JSON per request in HOME/logs/access.log")
    parser.add_argument("--server-command", default=None, help="instead of `python -m serving.server`")
    given = parser.parse_args(arguments)
    home = given.home.resolve()
    settings = replace(
        defaults,
        host=given.gateway_host,
        port=given.gateway_port,
        request_timeout_s=given.request_timeout_s,
        attempt_timeout_s=given.attempt_timeout_s,
        requests_max=given.requests_max,
        access_log=str(home / "logs" / "access.log") if given.access_log else None,
    )
    longest_s = LATENCY_EDGES_MS[-1] / 1000
    if not 0 < given.attempt_timeout_s <= given.request_timeout_s <= longest_s:
        parser.error(f"0 < --attempt-timeout-s <= --request-timeout-s <= {longest_s:g} must hold")
    if given.requests_max < 1:
        parser.error(f"--requests-max must be at least 1, not {given.requests_max}")
    made = AgentSettings(home, settings, given.gateway_threads)
    if given.server_command:
        made = replace(made, server_command=tuple(shlex.split(given.server_command)))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 after a clean stop, 2 if it could not start, with one sentence on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    settings = _parse(arguments)
    try:
        asyncio.run(serve(settings))
    except StartError as exc:
        print(f"lockgate agent: {exc}", file=sys.stderr)  # noqa: T201 - the one sentence for whoever started it
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
