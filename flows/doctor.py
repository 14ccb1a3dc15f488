"""`lockgate doctor`: what is wrong with this set-up, and what to do. Looks only, whether the platform is up or down."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator, Mapping

from flows.deployments import ALL, POOL, QUEUE
from flows.policy import shelf_in
from flows.record import verified
from flows.settings import Settings, read_settings
from flows.story import Unreadable, fold, policy_of
from flows.wiring import Addresses, Finding, has_ledger, health, ledger, routes, where
from policies.traffic import Route
from tasks.ports import BadInput, Ledger, PortError

_OTHERS = {"LOCKGATE_PROCESS", "LOCKGATE_SIMULATE_SEED"}  # variables of ours that are no settings
_QUIET_S = 60.0  # beyond its lease, and a rollout under way is driven by nobody
_AHEAD_S = 2.0


def examined() -> Iterator[Finding]:
    """Every finding, as it is made."""
    yield health.python()
    yield health.packages()
    yield health.envoy()
    try:
        settings = read_settings()
    except BadInput as exc:
        yield Finding("settings", False, str(exc), "mend the variable or the line in lockgate.toml")
        return
    yield variables(os.environ)
    yield health.folder(settings.folder)
    yield health.permissions(settings.folder)
    yield policies(settings)
    if settings.database:
        yield health.database(settings.database)
    try:
        addresses = where(settings)
    except PortError as exc:
        yield Finding("platform", False, str(exc), "lockgate down; lockgate up")
        return
    if addresses is None:
        yield Finding("platform", True, f"none runs in {settings.folder} (start one with: lockgate up)")
        yield health.ports(_ports(settings))
        yield from servers_elsewhere(settings)
    else:
        yield Finding("platform", True, f"process {addresses.pid} in {settings.folder}")
        yield from _running(settings, addresses)
    yield from record(settings, addresses is not None)


def variables(environment: Mapping[str, str]) -> Finding:
    """Each LOCKGATE_* variable is a setting: one that is mistyped is ignored without a word."""
    known = [f"LOCKGATE_{name.upper()}" for name in Settings.model_fields]
    unknown = sorted(name for name in environment if name.startswith("LOCKGATE_") and name not in {*known, *_OTHERS})
    if not unknown:
        return Finding("settings", True, "every LOCKGATE_* variable is one")
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.5) for name in unknown}
    meant = [f"{name} is no setting" + (f"; is {found[0]} meant?" if found else "") for name, found in near.items()]
    return Finding("settings", False, "; ".join(meant), "the README names all settings")


def policies(settings: Settings) -> Finding:
    """The platform's own policies can be read, and no two are for one model."""
    try:
        shelf = shelf_in(settings.shelf)
    except BadInput as exc:
        return Finding("policies", False, str(exc), "make it readable, or set LOCKGATE_POLICIES")
    wrong = [f"{name}: {why}" for name, why in shelf.unsound.items()]
    for model in sorted({each.policy.model for each in shelf.sound if each.policy.model}):
        try:
            shelf.policy_for(model)
        except BadInput as exc:
            wrong.append(str(exc))
    if wrong:
        return Finding("policies", False, "; ".join(wrong), "lockgate policy check FILE")
    return Finding("policies", True, f"{len(shelf.sound)} in {settings.shelf}, all sound")


def servers_elsewhere(settings: Settings) -> Iterator[Finding]:
    """Servers that are not the platform's own."""
    if settings.prefect_url is not None:
        yield from health.prefect(settings.prefect_url.removesuffix("/api"))
    if settings.mlflow_url is not None:
        yield from health.mlflow(settings.mlflow_url)


def _ports(settings: Settings) -> dict[str, int | None]:
    return {
        "Prefect": settings.prefect_port,
        "MLflow": settings.mlflow_port,
        "gateway": settings.gateway_port,
        "receiver": settings.trigger_port,
        "Evidently": settings.evidently_port,
    }


def _running(settings: Settings, addresses: Addresses) -> Iterator[Finding]:
    prefect = (settings.prefect_url or addresses.prefect).removesuffix("/api")
    yield from health.prefect(prefect)
    yield from health.mlflow(settings.mlflow_url or addresses.mlflow)
    scheduled = [f"{each.name}/{each.name}" for each in ALL if each.cron or each.interval_s]
    yield health.schedules(f"{prefect}/api", scheduled, QUEUE)
    yield health.worker(f"{prefect}/api", POOL)
    yield health.agent(addresses.agent_home)
    yield from health.hints(addresses, settings.mlflow_url, settings.folder / "cache")


# ---------------------------------------------------------------- the record, and what it says of the traffic


def record(settings: Settings, up: bool) -> Iterator[Finding]:
    """The ledger is as it was written, not dated ahead of this clock, and agrees with the traffic."""
    if not has_ledger(settings):
        yield Finding("ledger", True, "nothing has been written yet")
        return
    try:
        book = ledger(settings)
        seen = verified(book, None, None)
        names = book.unsettled()
    except PortError as exc:
        yield Finding("ledger", False, str(exc), "see the message; `lockgate audit verify` looks again")
        return
    if seen.breach is not None:
        says = f"entry {seen.breach.number}: {seen.breach.why}"
        yield Finding("ledger", False, says, "compare with an export: lockgate audit verify FILE")
        return
    yield Finding("ledger", True, f"{seen.head.number} entries, sound")
    now = time.time()
    ahead = max((book.last(name, 1)[0].at - now for name in book.rollouts()[:20]), default=0.0)
    yield Finding(
        "clock", ahead <= _AHEAD_S, f"the ledger is {max(0.0, ahead):.0f} s ahead of it", "set it right (NTP)"
    )
    if up:
        try:
            yield traffic(book, names, routes(settings), now)
        except PortError as exc:
            yield Finding("traffic", False, str(exc), "see the agent's finding")


def traffic(book: Ledger, unsettled: list[str], held: Mapping[str, Route], now: float) -> Finding:
    """Each share of a candidate belongs to a rollout under way, by its epoch, and somebody drives it."""
    wrong, owned = [], set()
    for name in unsettled:
        entries = book.read(name)
        owned.add(entries[0].body["model"])
        try:
            state, policy = fold(entries), policy_of(entries)
        except Unreadable as exc:
            wrong.append(str(exc))
            continue
        assert state is not None  # what is unsettled was requested
        route = held.get(state.model)
        if state.in_force:
            if state.stable and (route is None or (route.candidate, route.epoch) != (state.candidate, state.epoch)):
                wrong.append(f"{name} thinks that v{state.candidate} has traffic by epoch {state.epoch}; it has not")
            quiet = now - entries[-1].at
            if quiet > policy.rollout.lease + _QUIET_S:
                wrong.append(f"nobody has driven {name} for {quiet:.0f} s")
    for model, route in held.items():
        if route.candidate is not None and model not in owned:
            wrong.append(f"{model}: v{route.candidate} has traffic, and no rollout under way gave it")
    if wrong:
        return Finding("traffic", False, "; ".join(wrong), "the reconciler mends it in seconds; see `reconciler.log`")
    return Finding("traffic", True, f"{len(held)} models routed, {len(unsettled)} rollouts under way, epochs agree")
