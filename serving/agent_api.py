"""The node agent's admin API: HTTP/1.1 and JSON over a Unix socket, behind a bearer token.

    GET    /v1/status
    PUT    /v1/models/{model}/versions/{version}    202
    DELETE /v1/models/{model}/versions/{version}
    PUT    /v1/models/{model}/route                 200 once in force
    POST   /v1/models/{model}/lease
    GET    /v1/events?after=N

An error is `{"error": "one sentence", ...}` with the status of its class in `agent_errors.py`.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from aiohttp import web

from serving import routes
from serving.agent_errors import AgentError, BadRequest
from serving.node import Agent
from serving.supervisor import VersionSpec

BODY_BYTES_MAX = 1024 * 1024

_log = logging.getLogger("lockgate.agent")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def listen(agent: Agent, socket: Path, token: str) -> web.AppRunner:
    """The API is served on `socket`, which only the owner can use; `cleanup()` of what is returned ends it."""
    app = web.Application(middlewares=[_answering_errors, _authenticated(token)], client_max_size=BODY_BYTES_MAX)
    handlers = _Handlers(agent)
    app.add_routes(
        [
            web.get("/v1/status", handlers.status),
            web.put("/v1/models/{model}/versions/{version}", handlers.deploy),
            web.delete("/v1/models/{model}/versions/{version}", handlers.undeploy),
            web.put("/v1/models/{model}/route", handlers.route),
            web.post("/v1/models/{model}/lease", handlers.lease),
            web.get("/v1/events", handlers.events),
        ]
    )
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=2.0)
    await runner.setup()
    aside = socket.with_name("agent.sock.new")
    for path in (aside, socket):
        path.unlink(missing_ok=True)
    await web.UnixSite(runner, str(aside)).start()
    aside.chmod(0o600)
    aside.rename(socket)  # nobody can connect before the mode is right
    return runner


@web.middleware
async def _answering_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except AgentError as exc:
        return web.json_response({"error": str(exc), **exc.facts}, status=exc.status)
    except web.HTTPException as exc:
        return web.json_response({"error": f"{request.method} {request.path}: {exc.reason}"}, status=exc.status)
    except Exception as exc:  # noqa: BLE001 - the last resort of a server: logged in full, answered with 500
        _log.exception("%s %s failed", request.method, request.path)
        return web.json_response({"error": f"the agent failed: {exc!r}"}, status=500)


def _authenticated(token: str) -> Any:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), expected):
            return web.json_response({"error": "the token is missing or wrong; it is in agent.token"}, status=401)
        return await handler(request)

    return check


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._agent.status())

    async def deploy(self, request: web.Request) -> web.Response:
        body = await _body(request)
        source = body.pop("path", None)
        if not isinstance(source, str):
            raise BadRequest("'path' must name the model's file")
        spec = _spec(body, request.match_info["model"], request.match_info["version"])
        await self._agent.deploy(spec, Path(source))
        return web.json_response({"model": spec.model, "version": spec.version}, status=202)

    async def undeploy(self, request: web.Request) -> web.Response:
        model, version = request.match_info["model"], request.match_info["version"]
        await self._agent.undeploy(model, version)
        return web.json_response({"model": model, "version": version})

    async def route(self, request: web.Request) -> web.Response:
        route = routes.route_from(await _body(request), request.match_info["model"])
        await self._agent.set_route(route)
        return web.json_response({"model": route.model, "epoch": route.epoch})

    async def lease(self, request: web.Request) -> web.Response:
        body = await _body(request)
        epoch = body.get("epoch")
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            raise BadRequest(f"'epoch' must be a whole number, not {epoch!r}")
        left = await self._agent.renew(request.match_info["model"], epoch)
        return web.json_response({"lease_left_s": left})

    async def events(self, request: web.Request) -> web.Response:
        text = request.query.get("after", "0")
        if not text.isdecimal():
            raise BadRequest(f"'after' must be the number of an event, not '{text}'")
        return web.json_response({"events": self._agent.events(int(text))})


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(body).__name__}")
    return body


_KINDS: dict[str, tuple[type, ...]] = {
    "digest": (str,),
    "replicas": (int,),
    "threads": (int,),
    "prediction_output": (str, type(None)),
    "prediction_column": (int,),
    "sample_share": (int, float),
    "signature": (str, type(None)),
    "signed_by": (list,),
}


def _spec(body: dict[str, Any], model: str, version: str) -> VersionSpec:
    known = {field.name for field in fields(VersionSpec)} - {"model", "version"}
    for name, value in body.items():
        if name not in known:
            raise BadRequest(f"unknown field '{name}'; known are path, {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
            raise BadRequest(f"'{name}' cannot be {value!r}")
    if not all(isinstance(key, str) for key in body.get("signed_by", ())):
        raise BadRequest(f"'signed_by' must be a list of public keys, not {body['signed_by']!r}")
    if "digest" not in body:
        raise BadRequest("'digest' is missing: the SHA-256 of the model's file, in hex")
    return VersionSpec(model=model, version=version, **body)
