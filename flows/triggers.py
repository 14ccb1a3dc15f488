"""From what the registry asks for to flow runs of `deliver`, each once.

A pass looks at how the registry, the ledger and Prefect stand; hints only make it come earlier. What is under way, by
the ledger or by Prefect, is not started again, and the idempotency key of a run makes two passes at once start one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flows.policy import Found, Shelf, find, shelf_in
from policies.policy import PolicyError
from policies.triggers import POLICY_TAG, Run, attempt, wanted
from tasks.outcome import settle
from tasks.ports import BadInput, Ledger, PortError, Registered, Registry

REGISTRY = "registry"  # who asked, where an alias, a tag or a new version did
_HANGS_S = 2.0  # so long for nothing, and Prefect's server hangs
_CANCELLED_TAG = "lockgate.cancelled"  # how many runs of a wish there were when a person cancelled the last


@dataclass(frozen=True)
class Wish:
    """A version that the registry asks for.

    Its key has the time at which the version was made instead of its digest: that is known without reading the bytes
    of a version that somebody else registered, and tells versions of one number apart as well.
    """

    model: str
    version: str
    made_at: float
    policy: str
    why: str
    cancelled: str = ""

    @property
    def key(self) -> str:
        return f"{self.model}/{self.version}@{self.made_at:.3f}"


class Runs(Protocol):
    """The flow runs that were started for wishes."""

    def of(self, wishes: Sequence[Wish]) -> Mapping[str, Sequence[Run]]:
        """Those of each wish, by its key, oldest first. Raises PortError."""

    def start(self, wish: Wish, number: int) -> None:
        """Run `number` of the wish is there, once however often it is asked for. Raises PortError."""


@dataclass
class Seen:
    """What one pass did: the runs that it started, and what stood in the way of others; `soon`: it may be gone soon."""

    started: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    soon: bool = False


def look(registry: Registry, ledger: Ledger, runs: Runs, shelf: Path, now: Callable[[], float]) -> Seen:
    """One pass. Raises PortError if the registry, the ledger or Prefect cannot be reached.

    Ledger and Prefect are asked once for all wishes: many may wait, and each is looked at in every pass.
    """
    policies = shelf_in(shelf)
    seen = Seen(left=dict(policies.unsound))
    asked: list[tuple[Found, list[Wish]]] = []
    for each in registry.models():
        try:
            found = policy_for(policies, each)
        except (BadInput, PolicyError) as exc:
            seen.left[each.model] = str(exc)
            continue
        if found is not None:
            asked.append((found, wishes(registry, each, found)))
    all_wishes = [wish for _, of_model in asked for wish in of_model]
    if not all_wishes:
        return seen
    busy, before, waited_s = under_way(ledger), runs.of(all_wishes), 0.0
    for found, of_model in asked:
        for wish in of_model:
            if (wish.model, wish.version) in busy:
                break
            began = now()
            goes_first = _started(registry, runs, wish, before[wish.key], found.policy.trigger.alias, began, seen)
            waited_s += now() - began if wish.key in seen.left else 0.0
            if waited_s > _HANGS_S:
                return seen  # each of the others would wait as long; the next look asks again
            if goes_first:
                break  # the versions of one model go one after the other, oldest first
    return seen


def policy_for(shelf: Shelf, model: Registered) -> Found | None:
    """The model's policy: the one that its tag names, else the one that names it. Raises BadInput, PolicyError."""
    named = model.tags.get(POLICY_TAG)
    if named is None:
        return shelf.policy_for(model.model)
    if "/" in named or "\n" in named:
        raise BadInput(f"the tag {POLICY_TAG} of '{model.model}' must be the name of a policy, not '{named}'")
    return find(shelf.folder, named)


def wishes(registry: Registry, model: Registered, found: Found) -> list[Wish]:
    """What is asked for, oldest version first."""
    trigger = found.policy.trigger
    if trigger.kind == "nothing" or (trigger.kind == "alias" and trigger.name not in model.aliases):
        return []
    listed = {each.version: each for each in model.said}
    if trigger.kind != "alias" or model.aliases[trigger.name] not in listed:
        listed = {each.version: each for each in registry.listed(model.model)}
    asked = wanted(trigger, model.aliases, {number: each.tags for number, each in listed.items()})
    why = "a new version" if trigger.kind == "version" else f"{trigger.kind} {trigger.name}"
    return [
        Wish(model.model, number, each.made_at, str(found.path), why, each.tags.get(_CANCELLED_TAG, ""))
        for number, each in ((number, listed[number]) for number in asked)
    ]


def under_way(ledger: Ledger) -> set[tuple[str, str]]:
    """The models and versions whose rollout has something left to do: also one that was started by hand."""
    requests = [ledger.read(name)[0].body for name in ledger.unsettled()]
    return {(request["model"], request["candidate"]) for request in requests}


def _started(
    registry: Registry, runs: Runs, wish: Wish, before: Sequence[Run], alias: str | None, now: float, seen: Seen
) -> bool:
    """Starts a run for the wish if it is time; whether the model's later versions have to wait for this one."""
    if before and before[-1].cancelled and wish.cancelled != str(len(before)):
        registry.tag(wish.model, wish.version, {_CANCELLED_TAG: str(len(before))})
        settle.fn(registry, wish.model, wish.version, alias, "cancelled", "its flow run was cancelled by a person")
        return False
    number = attempt(before, now)
    if number is not None:
        try:
            runs.start(wish, number)
        except PortError as exc:
            seen.left[wish.key] = str(exc)
            seen.soon = True
            return True
        seen.started.append(f"{wish.model} v{wish.version} ({wish.why}, run {number})")
    return True
