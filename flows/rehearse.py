"""A dry run: with this policy and the recorded traffic, how would this candidate have gone, and why?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow

from flows.policy import find, for_model, shelf_in
from flows.runner import in_prefect
from flows.settings import Settings
from flows.wiring import Candidate, connect, recordings
from policies.rehearsal import rehearse as played
from policies.words import duration
from tasks.ports import BadInput, NotThere, Ports
from tasks.registration import fetch


@flow(name="rehearse", flow_run_name="{model}: rehearsal", retries=0)
def rehearse(
    model: str,
    version: int | None = None,
    policy: str | None = None,
    file: str | None = None,
    rows: str | None = None,
    rps: float = 50.0,
    hours: float = 24.0,
) -> dict[str, Any]:
    """Plays a rollout on recorded traffic, with the same machine and gates. Nothing is deployed, and the ledger gets
    no entry. Returns a `Rehearsal` as a dictionary.

    Args:
        model: Name of the registered model, e.g. flight-delay.
        version: The candidate in the registry; by default the one that the alias `candidate` names.
        policy: Name of a policy, a file's path, or the YAML text; by default the one whose `model` this is.
        file: Instead of a version: an .onnx file on the worker's machine.
        rows: Instead of what the servers sampled: a CSV or Parquet file of rows, answered by both versions.
        rps: With `rows`: how many of them come in a second.
        hours: How far back the sampled traffic goes.

    Raises BadInput and NotThere for what cannot be rehearsed.
    """
    if version is not None and file is not None:
        raise BadInput("say what to rehearse with `version` or `file`, not with both")
    if not (rps > 0 and hours > 0):
        raise BadInput(f"`rps` and `hours` are above zero, not {rps:g} and {hours:g}")
    shelf = Settings().shelf
    found = find(shelf, policy) if policy else shelf_in(shelf).policy_for(model)
    if found is None:
        raise BadInput(f"no policy in {shelf} says `model: {model}`; name one")
    rules = for_model(found.policy, model)
    ports = connect()
    stable = _serving(ports, model)
    label, candidate = _candidate(ports, model, version, file)
    source = recordings()
    if rows is None:
        recording, compare = source.sampled(rules, model, stable, candidate, hours)
    else:
        former = _of_version(ports, model, stable)
        recording, compare = source.in_file(rules, Path(rows), rps, former, candidate)
    seen = played(rules, model, label, stable, recording, compare)
    began = float(recording.at[0]) if rows is None else None
    return {"model": model, "candidate": label, "stable": stable, "policy": rules.name, "began": began} | asdict(seen)


def _serving(ports: Ports, model: str) -> str:
    route = ports.router.current(model)
    if route is None or route.stable is None:
        raise NotThere(f"no version of '{model}' serves: there is nothing to rehearse against")
    return route.stable


def _candidate(ports: Ports, model: str, version: int | None, file: str | None) -> tuple[str, Candidate]:
    if file is not None:
        path = Path(file).expanduser().absolute()
        return path.name, Candidate.of_file(path, ports.inspector.signature(path))
    if version is not None:
        return str(version), _of_version(ports, model, str(version))
    named = ports.registry.by_alias(model, "candidate")
    if named is None:
        raise NotThere(f"the alias `candidate` names no version of '{model}'; name one")
    return named.version, _of_version(ports, model, named.version)


def _of_version(ports: Ports, model: str, number: str) -> Candidate:
    version = ports.registry.version(model, number)
    bundle = in_prefect(fetch, ports.registry, version, name=f"fetch v{number}")
    return Candidate(bundle.onnx, version.digest, version.signature)


def lines(seen: dict[str, Any]) -> list[str]:
    """The rehearsal as text."""
    ends = {
        "promoted": "would have been promoted",
        "rolled_back": "would have gone back",
        "unfinished": "would not have come to an end",
    }
    who = f"{seen['model']} {seen['candidate']} by policy {seen['policy']}, against v{seen['stable']}"
    told = [
        f"{who}: {ends[seen['outcome']]} after {duration(round(seen['seconds']))}: {seen['why']}",
        f"  {seen['requests']:,} recorded rows; the candidate would have answered {seen['exposed']:,} of them",
    ]
    told += [f"  {move['at_s']:8.0f} s  {move['label']}" for move in seen["moves"]]
    told += [f"  {report['verdict']:<5} {report['gate']}: {report['says']}" for report in seen["reports"]]
    return [*told, f"  not rehearsed: {'; '.join(seen['not_asked'])}"]
