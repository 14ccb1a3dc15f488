"""What runs and what is routed on this machine: the node agent without its process and its API.

Its state is one file; `begin` makes the machine be as the file says, going on with the processes that survived a killed
agent. A change of traffic is answered once it is on disk and in force; both are waited for at once, since a disk may
take longer than all the rest. An agent that dies in between has answered nobody, and goes on from the former state or
the new one. What takes traffic away comes into force whatever the disk is doing, for this change or another: where the
gateway cannot be told, whoever lost a share is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from policies.traffic import Route
from serving import gateway, gateway_routes, node_state, routes
from serving.agent_errors import AgentError, BadRequest, Conflict, NotDurable, StartError
from serving.durable import EventLog, ModelStore, StateFile, drop_oldest
from serving.envoy import Envoy
from serving.launcher import SERVER, Launcher
from serving.node_state import since_boot
from serving.processes import survivors
from serving.supervisor import Places, VersionRunner, VersionSpec

LEASE_CHECK_S = 0.2
LEAVE_S = 0.2  # from the clusters' change being in force to the end of the server: what Envoy has just sent arrives
UNUSED_SAMPLES_KEPT = 3  # versions, per model
UNUSED_LOGS_KEPT = 50
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")

_log = logging.getLogger("lockgate.node")


@dataclass(frozen=True)
class AgentSettings:
    """How an agent is started."""

    home: Path
    gateway: gateway.GatewaySettings
    gateway_threads: int = 1
    server_command: tuple[str, ...] = SERVER


class Agent:
    """What runs and what is routed on this machine."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.home = settings.home
        self.started = time.time()
        self._state = StateFile(self.home / "state.json")
        self._versions = asyncio.Lock()  # one version at a time comes or goes
        self._growing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by model: whose traffic may grow
        self._applying = asyncio.Lock()  # never held over a disk's sync
        self._saving: asyncio.Task[None] | None = None
        self._unsaved = False
        self._runners: dict[tuple[str, str], VersionRunner] = {}
        self._held: dict[str, routes.Held] = {}
        self._leaving: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._unapplied = False
        self._in_force: list[Route] = []
        self._warned: set[str] = set()
        self._lease_task: asyncio.Task[None] | None = None
        for folder in ("models", "logs", "run", "samples", "envoy"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        self._store = ModelStore(self.home / "models")
        self._events = EventLog(self.home / "events.jsonl")
        self._launcher = Launcher(self.home, settings.server_command)
        self._envoy = Envoy(self.home, settings.gateway, settings.gateway_threads, self._tell)

    # --- life ---

    async def begin(self) -> None:
        """Everything that the state file names runs, or is being started. Raises StartError."""
        try:
            specs, held = node_state.read(self._state.path)
        except AgentError as exc:
            raise StartError(str(exc)) from exc
        self._held = {each.route.model: each for each in held}
        found = survivors(self.home)
        self._launcher.begin()  # always a new one: a surviving zygote may have imported what has since been replaced
        adopted = sum(len(processes) for processes in found.values())
        for spec in specs:
            self._new_runner(spec).begin(found)
        self._end_leases()
        envoys = found.get(self._envoy.what, [])
        envoy = envoys.pop() if envoys else None
        await asyncio.gather(*(process.stop(5.0) for processes in found.values() for process in processes))
        self._unapplied = not await self._envoy.begin(envoy, self._clusters(), self._routes())
        self._in_force = self._told() if self._unapplied else [held.route for held in self._held.values()]
        self._tell("agent-started", f"the agent started with {len(specs)} versions, {adopted} processes still running")
        self._lease_task = asyncio.create_task(self._keep_leases(), name="leases")

    async def stop(self) -> None:
        """Drains and ends the gateway, then the servers."""
        if self._lease_task is not None:
            self._lease_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._lease_task
        await self._envoy.stop()
        if self._saving is not None:
            await self._saving
        await asyncio.gather(*self._leaving.values(), *(runner.stop() for runner in self._runners.values()))
        await self._launcher.stop()

    # --- what can be asked for ---

    async def deploy(self, spec: VersionSpec, source: Path) -> None:
        """The version is kept here and being started. Idempotent.

        Raises Conflict for other bytes or settings under the same name, BadRequest, NotDurable.
        """
        _check_names(spec)
        await self._has_left(spec)
        await asyncio.to_thread(self._store.add, source, spec.digest)  # may take long, so before the lock: leases go on
        async with self._versions:
            await self._has_left(spec)  # it may have been told to go meanwhile
            runner = self._runners.get((spec.model, spec.version))
            if runner is not None:
                if runner.spec.digest != spec.digest:
                    raise Conflict(
                        f"version {spec.version} of {spec.model} is deployed with the digest {runner.spec.digest},"
                        f" not {spec.digest}",
                        digest=runner.spec.digest,
                    )
                if runner.spec == spec:
                    return
                raise Conflict(
                    f"version {spec.version} of {spec.model} is deployed with other settings"
                    f" ({_difference(runner.spec, spec)}); undeploy it first"
                )
            runner = self._new_runner(spec)
            try:
                await self._save()
            except BaseException:
                del self._runners[spec.model, spec.version]
                raise
            runner.begin({})
            await self._apply()

    async def _has_left(self, spec: VersionSpec) -> None:
        """The version's former processes, if they drain, are gone: they have its sockets."""
        leaving = self._leaving.get((spec.model, spec.version))
        if leaving is not None:
            await asyncio.shield(leaving)

    async def undeploy(self, model: str, version: str) -> None:
        """Drained and gone. Idempotent. Raises Conflict while the route sends it traffic."""
        async with self._versions:
            runner = self._runners.get((model, version))
            if runner is None:
                return
            while self._unapplied:  # the gateway may still send it traffic by a former route
                await self._apply()
            held = self._held.get(model)
            if held is not None and version in _in_use(held.route):
                raise Conflict(f"version {version} of {model} is in the route; route the traffic elsewhere first")
            del self._runners[model, version]  # no route may name it from now on
            try:
                await self._save()
            except BaseException:
                self._runners[model, version] = runner
                raise
            try:
                await self._apply()
            finally:
                leaving = self._leaving[model, version] = asyncio.create_task(self._leave(runner))
        await asyncio.shield(leaving)

    async def _leave(self, runner: VersionRunner) -> None:
        """Drained and ended, once no request can be on its way to it; of what it left behind, the newest is kept."""
        spec = runner.spec
        try:
            await asyncio.sleep(LEAVE_S)
            await runner.stop()
        finally:
            del self._leaving[spec.model, spec.version]
        self._store.prune(each.digest for each in self._specs())
        samples = {each.samples for each in self._runners.values()}
        drop_oldest(runner.samples.parent.iterdir(), samples, UNUSED_SAMPLES_KEPT)
        logs = {replica.log for each in self._runners.values() for replica in each.replicas}
        drop_oldest((self.home / "logs").glob("????????????.*log"), logs, UNUSED_LOGS_KEPT)

    async def set_route(self, route: Route) -> None:
        """In force in the gateway when this returns. Raises Conflict, NotReady, NotDurable, NotInForce."""
        if self._gives_no_more(route):
            await self._set_route(route, may_be_lost=True)
        else:
            async with self._growing[route.model]:
                before = self._held.get(route.model)
                may_be_lost = routes.without_more(before.route if before else None, route)
                await self._set_route(route, may_be_lost)

    def _gives_no_more(self, route: Route) -> bool:
        before = self._held.get(route.model)
        if before is not None and before.route == route and (route.weight or route.shadow):
            return False  # asked again while the disk is waited for: what becomes of it is not known yet
        return routes.without_more(before.route if before else None, route)

    async def _set_route(self, route: Route, may_be_lost: bool) -> None:
        """Brings the route in force and on disk. With `may_be_lost` a disk that takes no more does not prevent it; else
        the former route stays, or is in force again, when NotDurable is raised.
        """
        model, before = route.model, self._held.get(route.model)
        for version in _in_use(route):
            if (model, version) not in self._runners:
                raise Conflict(f"version {version} of {model} is not deployed here; deploy it first")
        self._hold(model, routes.changed(before, route, self._capacity(model), since_boot()))
        try:
            aside = self._state.aside(self._as_bytes())
        except NotDurable as exc:
            if not may_be_lost:
                self._hold(model, before)
                raise
            self._tell("not-durable", f"the route of {model} will not be on disk: {exc}", model=model)
            await self._apply()
            return
        # Both at once, the gateway being told before the disk is waited for.
        applied, written = await asyncio.gather(self._apply(), self._state.put(aside), return_exceptions=True)
        if isinstance(written, NotDurable) and may_be_lost:
            self._tell("not-durable", f"the route of {model} is not on disk: {written}", model=model)
        elif isinstance(written, BaseException):
            await self._take_back(route, before)
            raise written
        if isinstance(applied, BaseException):
            raise applied

    async def _take_back(self, route: Route, before: routes.Held | None) -> None:
        """The former route is in force again, unless the refused one has been replaced while the disk was waited for.
        It may have come under its name on disk all the same, so the state is written once more."""
        if self._held[route.model].route == route:
            self._hold(route.model, before)
        await self._apply()
        with contextlib.suppress(NotDurable):
            await self._save()

    def _hold(self, model: str, held: routes.Held | None) -> None:
        self._unapplied = True
        if held is None:
            self._held.pop(model, None)
        else:
            self._held[model] = held

    async def renew(self, model: str, epoch: int) -> float | None:
        """The lease begun anew; the seconds it now has. Raises Conflict."""
        held = self._held[model] = routes.renewed(self._held.get(model), model, epoch, since_boot())
        self._save_soon()  # a restart may find the older renewal: shorter, never longer
        return held.lease_left_s(since_boot())

    def events(self, after: int) -> list[dict[str, Any]]:
        """What the agent did by itself after that event."""
        return self._events.after(after)

    def status(self) -> dict[str, Any]:
        """Everything that runs and is routed, as the API answers it."""
        models: dict[str, Any] = {}
        for model in sorted({*self._held, *(model for model, _ in self._runners)}):
            running = {version: runner for (name, version), runner in self._runners.items() if name == model}
            models[model] = {
                "route": self._route_status(model),
                "versions": {version: running[version].status() for version in sorted(running)},
            }
        agent = {"pid": os.getpid(), "started": self.started}
        return {"agent": agent, "gateway": self._envoy.status(), "models": models}

    def _route_status(self, model: str) -> dict[str, Any] | None:
        held = self._held.get(model)
        if held is None:
            return None
        lost = asdict(held.lost) if held.lost else None
        return {**asdict(held.route), "lease_left_s": held.lease_left_s(since_boot()), "lease_lost": lost}

    # --- leases ---

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            try:
                ended = self._end_leases()
                if ended or self._unapplied:
                    await self._apply_or_suspend()
                if ended:
                    self._save_soon()  # a restart finds the lease over again
            except Exception:  # noqa: BLE001 - nothing may end the enforcement of leases; it is logged in full
                _log.exception("the lease check failed; it goes on")

    async def _apply_or_suspend(self) -> None:
        """Brings the routes in force. Where the gateway cannot be told (a full disk), whoever lost a share is stopped:
        the gateway then finds nobody there, and asks whom it knows as the stable version. Tried again at the next turn.
        """
        try:
            await self._apply()
        except AgentError as exc:
            self._warn_once(f"the routes are not in force yet: {exc}")
            for model, version in self._lost_shares():
                runner = self._runners[model, version]
                says = f"version {version} of {model} is stopped, since the gateway could not be told to leave it"
                self._tell("suspended", says, model=model, version=version)
                await runner.suspend()
        else:
            for runner in self._runners.values():
                if runner.suspended:
                    runner.resume()

    def _lost_shares(self) -> list[tuple[str, str]]:
        """Running versions that have a share of the traffic in the routes in force, and shall have none; but not who is
        the stable version there, since nobody would be asked instead."""
        lost = []
        for route in self._in_force:
            held = self._held.get(route.model)
            wanted = dict(gateway_routes.shares(held.route)) if held else {}
            for version, _ in gateway_routes.shares(route):
                runner = self._runners.get((route.model, version))
                if version in (*wanted, route.stable) or runner is None or runner.suspended:
                    continue
                stable = self._runners.get((route.model, route.stable or ""))
                if stable is not None and stable.ready:
                    lost.append((route.model, version))
        return lost

    def _told(self) -> list[Route]:
        """Who may have a share beside whom, by the routes that the gateway has been told: of those that run here."""
        told = self._envoy.routes_told()
        return [
            Route(model, stable, version, weight=1)
            for model, version in self._runners
            for other, stable in self._runners
            if other == model and stable != version and f'"{gateway.arm_name(model, version, stable)}"' in told
        ]

    def _end_leases(self) -> bool:
        """Takes the share from every candidate whose lease is over. True if any was."""
        ended = False
        for model, held in list(self._held.items()):
            if not routes.ran_out(held, since_boot()):
                continue
            lost = routes.back_on_stable(held, time.time())
            epoch, route = held.route.epoch, held.route
            capacity = self._capacity(model)
            stable, candidate = capacity.get(route.stable or ""), capacity.get(route.candidate or "")
            if self._lease_task is not None and (not stable or not stable.ready) and candidate and candidate.ready:
                # Going back would be an outage: the candidate is the only healthy copy. Go back as soon as that ends.
                self._warn_once(
                    f"the lease of epoch {epoch} for {model} is over, but version {route.stable} has no ready replica"
                )
                continue
            self._held[model] = lost
            says = f"the lease of epoch {epoch} for {model} ran out: all traffic goes back to version {route.stable}"
            self._tell("lease-lost", says, model=model, epoch=epoch, candidate=route.candidate)
            ended = self._unapplied = True
        return ended

    # --- the gateway ---

    async def _apply(self) -> None:
        """Clusters first, then the routes that name them."""
        async with self._applying:
            self._unapplied = True
            wanted = [held.route for held in self._held.values()]
            clusters, resources = self._clusters(), self._routes()  # of one moment: no route names a cluster to come
            await self._envoy.put("clusters", clusters)
            await self._envoy.put("routes", resources)
            self._in_force = wanted
            self._unapplied = wanted != [held.route for held in self._held.values()]
            self._warned.clear()

    def _clusters(self) -> list[dict[str, Any]]:
        settings = self.settings.gateway
        waits = {model: gateway_routes.times_s(held.route, settings)[1] for model, held in self._held.items()}
        backends = [
            gateway.Backend(model, version, tuple(replica.endpoint for replica in runner.replicas), waits.get(model))
            for (model, version), runner in self._runners.items()
        ]
        return gateway.cluster_resources(backends, settings)

    def _routes(self) -> list[dict[str, Any]]:
        return gateway_routes.route_resources([held.route for held in self._held.values()], self.settings.gateway)

    # --- state ---

    def _new_runner(self, spec: VersionSpec) -> VersionRunner:
        samples = self.home / "samples" / quote(spec.model, safe="") / quote(spec.version, safe="")
        places = Places(self.home / "run", self.home / "logs", samples, self._store.path(spec.digest))
        runner = VersionRunner(spec, places, self._launcher, self._tell)
        self._runners[spec.model, spec.version] = runner
        return runner

    def _specs(self) -> list[VersionSpec]:
        return [runner.spec for runner in self._runners.values()]

    def _capacity(self, model: str) -> Mapping[str, routes.Capacity]:
        return {
            version: routes.Capacity(len(runner.replicas), runner.ready)
            for (name, version), runner in self._runners.items()
            if name == model
        }

    async def _save(self) -> None:
        """What is wanted now is on disk when this returns. Raises NotDurable."""
        await self._state.put(self._state.aside(self._as_bytes()))

    def _save_soon(self) -> None:
        """For what nobody waits for, and a restart can do without."""
        self._unsaved = True
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save_while_asked(), name="saving")

    async def _save_while_asked(self) -> None:
        while self._unsaved:
            self._unsaved = False
            with contextlib.suppress(NotDurable):
                await self._save()

    def _as_bytes(self) -> bytes:
        return node_state.written(self._specs(), self._held.values())

    def _tell(self, kind: str, says: str, **facts: Any) -> None:
        _log.info("%s", says)
        self._events.add(kind, says, **facts)

    def _warn_once(self, says: str) -> None:
        if says not in self._warned:
            self._warned.add(says)
            self._tell("warning", says)


def _in_use(route: Route) -> set[str]:
    """The versions that the route needs: those with a share, and the stable one, to which failures are moved."""
    versions = {version for version, _ in gateway_routes.shares(route)} | {route.stable, gateway_routes.shadowed(route)}
    return {version for version in versions if version is not None}


def _check_names(spec: VersionSpec) -> None:
    for what, name in (("model", spec.model), ("version", spec.version)):
        if not _NAME.match(name):
            raise BadRequest(f"'{name}' is no name for a {what}: use letters, digits, '.', '_' and '-', at most 128")
    if not re.fullmatch(r"[0-9a-f]{64}", spec.digest):
        raise BadRequest(f"'{spec.digest}' is no SHA-256 in hex")
    if not 1 <= spec.replicas <= 64:
        raise BadRequest(f"{spec.replicas} replicas: there must be between 1 and 64")


def _difference(here: VersionSpec, asked: VersionSpec) -> str:
    one, other = asdict(here), asdict(asked)
    return ", ".join(f"{name} {one[name]}, asked for {other[name]}" for name in one if one[name] != other[name])
