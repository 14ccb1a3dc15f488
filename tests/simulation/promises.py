"""What must hold after every run, whatever went wrong in it: the invariants of the design, each named by its number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from flows.story import evidence_of, fold, is_way_back, policy_of
from policies import audit, gates
from policies.events import LOOKED_AT, Phase, from_body
from policies.evidence import Counts
from policies.rollout import Rollout, step
from policies.traffic import Route
from policies.verdict import Verdict, worst
from tasks.ports import Entry
from tests.simulation.world import MODEL, Run

_AT_ONCE_S = 1.0  # from the failing look to the traffic being back, where nothing that this needs is in trouble
_STAGED = {*LOOKED_AT, Phase.PROMOTING}


def breaches(run: Run) -> list[str]:
    """Every promise that the run has broken, as a sentence; none if all is well."""
    books = {name: run.ledger._books[name] for name in run.ledger._requested()}
    found = [f"a process ended with an error: {error}" for error in run.errors]
    if not run.rested:
        left = {name: state.label for name in run.ledger.unsettled() if (state := fold(books[name]))}
        waiting = [actor.name for actor in run.actors.all if not actor.ended]
        found.append(f"3: not at rest; unsettled: {left}; processes {waiting[:6]}")
    for name, book in books.items():
        found += [f"{name}: {what}" for what in _of_rollout(run, book)]
    found += _of_traffic(run)
    found += _one_at_a_time(books)
    found += _of_ledger(run)
    if run.rested:
        found += _of_rest(run, books)
    return found


def _of_rollout(run: Run, book: list[Entry]) -> Iterator[str]:
    """1: nothing is promoted without evidence. 3: each effect is done once. 8: its verdicts can be recomputed."""
    policy = policy_of(book)
    known = gates.begin(policy)
    state: Rollout | None = None
    passed: set[int] = set()
    ordered = False
    done: set[str] = set()
    requests = Seen()
    seen_failing: float | None = None
    for entry in book:
        before = state
        state, _ = step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
        evidence = evidence_of(entry)
        if evidence is not None:
            stage = int(entry.body["stage"])
            known, reports = gates.look(policy, stage, known, evidence)
            verdict = worst(report.verdict for report in reports)
            if verdict is not Verdict(entry.body["verdict"]):
                yield f"8: entry {entry.sequence} says {entry.body['verdict']}, recomputed it is {verdict}"
            requests.add(evidence.candidate)
            if verdict is Verdict.PASS:
                passed.add(stage)
                if evidence.candidate is None or requests.total < gates.REQUESTS_MIN:
                    yield f"1: entry {entry.sequence} passes on {evidence.candidate}, {requests.total} requests in all"
        ordered = ordered or entry.body.get("order") == "promote"
        if entry.kind == "done":
            if entry.body["effect"] in done:
                yield f"3: {entry.body['effect']} is done twice"
            done.add(entry.body["effect"])
        if seen_failing is not None and entry.kind == "done" and state.phase is Phase.ROLLED_BACK:
            if _in_reach(run) and entry.at - seen_failing > _AT_ONCE_S:
                yield f"9: the traffic was taken back {entry.at - seen_failing:.1f} s after the failing look"
            seen_failing = None
        if state.phase is Phase.ROLLING_BACK and entry.kind == "looked":
            seen_failing = entry.at
        promoting = state.phase is Phase.PROMOTING and before is not None and before.phase is not Phase.PROMOTING
        if promoting and not ordered and not passed >= set(range(len(state.terms.stops))):
            yield f"1: promoted with stages {sorted(passed)} passed"
    assert state is not None
    if state.phase is Phase.PROMOTED and state.terms.watch_s and len(policy.rollout.stages) not in passed:
        yield "1: promoted without a passed watch"
    yield from _of_approvals(book)
    if is_way_back(book) and any(entry.kind == "lost" for entry in book):
        yield "9: the traffic went to the version that is to go again"
    if run.made.silent and state.phase is Phase.PROMOTED and state.terms.stops and not ordered:
        yield "1: promoted without any traffic"


def _of_approvals(book: list[Entry]) -> Iterator[str]:
    """Nothing goes past what people must approve before enough of those whom the policy names have."""
    asked = policy_of(book).governance.approvals
    if asked is None or is_way_back(book):
        return
    approved: set[str] = set()
    state: Rollout | None = None
    for entry in book:
        before = state
        state, _ = step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
        if entry.kind == "answered" and entry.body["answer"] == "approve":
            approved.add(entry.body["by"])
        live = state.phase is Phase.PROMOTING or (asked.before == "canary" and state.phase is Phase.CANARY)
        entered = live and before is not None and before.phase is not state.phase
        if entered and len(approved & set(asked.by)) < asked.count:
            yield f"{state.phase} with the approval of {sorted(approved)}, {asked.count} needed"


@dataclass
class Seen:
    """How many requests a rollout's looks have seen in all: each of its controllers counts from zero."""

    last: float = 0.0
    total: float = 0.0

    def add(self, counts: Counts | None) -> None:
        if counts is not None and math.isfinite(counts.requests) and counts.requests >= 0:
            self.total += counts.requests - self.last if counts.requests >= self.last else counts.requests
            self.last = counts.requests


def _in_reach(run: Run) -> bool:
    """Whether nothing that a rollback needs was in trouble: registry and telemetry may be, it needs neither."""
    made = run.made
    troubled = {*(made.weather.ports if made.weather.rates else ()), *made.weather.down}
    stopped = {"frozen", "slow", "dies before", "dies after"} & set(made.weather.rates)
    return troubled <= {"registry", "telemetry"} and not (stopped or made.deaths or made.jumps)


def _of_traffic(run: Run) -> Iterator[str]:
    """4: a share ends with its lease. 5: no failure raises a share. 7: quarantined bytes get nothing anew."""
    by_number = {entry.number: entry for entry in run.ledger.entries}
    lease = run.made.policy.rollout.lease
    highest, share = 0, 0
    before: Route | None = None
    taken_back: set[int] = set()
    for at, route, quarantined in run.router.noted:
        if before is not None and before.candidate and not route.candidate and route.epoch == before.epoch:
            taken_back.add(route.epoch)
        elif route.candidate and route.epoch in taken_back:
            yield f"4: v{route.candidate} got traffic again by epoch {route.epoch}, whose lease had run out"
        before = route
        if route.epoch < highest:
            yield f"5: epoch {route.epoch} came into force after {highest}"
        highest = max(highest, route.epoch)
        if route.candidate is not None and route.stable is not None:
            back = is_way_back(run.ledger._books[by_number[route.epoch].rollout])
            if (route.lease_s is not None) if back else not 0 < (route.lease_s or 0.0) <= lease:
                meant = "that it must not lose" if back else f"without a lease of {lease:g} s"
                yield f"4: v{route.candidate} has traffic {meant}: {route}"
        if route.candidate is not None and route.weight > share:
            asked = by_number[route.epoch]
            said = asked.body.get("verdict") or asked.body.get("order") or asked.body.get("answer")
            good = asked.kind == "done" or said in ("pass", "promote", "approve")
            if not good:
                yield f"5: {asked.kind} (entry {asked.number}) raised the share of v{route.candidate}"
        share = route.weight if route.candidate else 0
        for version in (route.stable, route.candidate):
            guilty = version is not None and run.made.digests[version] in quarantined
            if guilty and version is not None and not _was_there_before(run, version, at):
                yield f"7: v{version} is in quarantine and got traffic at {at:.1f}"


def _was_there_before(run: Run, version: str, at: float) -> bool:
    """Whether the version was the stable one of the route before: then nothing was given to it now."""
    earlier = [route for when, route, _ in run.router.noted if when < at]
    return bool(earlier) and version in (earlier[-1].stable,)


def _one_at_a_time(books: dict[str, list[Entry]]) -> Iterator[str]:
    """Of one model, no two rollouts have a hand in the traffic at once."""
    spans = []
    for name, book in books.items():
        inside = []
        state: Rollout | None = None
        for entry in book:
            state, _ = step(state, from_body(entry.kind, entry.body, entry.at, entry.number))
            if state.phase in _STAGED or (state.pending and state.phase is not Phase.PENDING):
                inside.append(entry.number)
        if inside:
            spans.append((inside[0], inside[-1], name))
    spans.sort()
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin <= end:
            yield f"{one} and {other} were under way at once (entries {begin} to {end})"


def _of_ledger(run: Run) -> Iterator[str]:
    """8: the chain holds from the first entry to the last."""
    seen = audit.verify(run.ledger.lines())
    if seen.breach is not None:
        yield f"8: {seen.breach}"


def _of_rest(run: Run, books: dict[str, list[Entry]]) -> Iterator[str]:
    """3: when all is over, the traffic, the processes and the registry say the same as the ledger."""
    held = run.router.held.get(MODEL)
    if held is None:
        return
    states = [state for book in books.values() if (state := fold(book)) is not None]
    halted = {state.candidate for state in states if state.phase is Phase.HALTED}
    if not halted & {held.route.stable, held.route.candidate}:  # else who serves is a person's to say
        yield from _of_who_serves(run, states, held.route)
    if run.ledger._claims:
        yield f"3: claims are left: {run.ledger._claims}"
    for name in books.keys() - run.registry.told:
        yield f"3: nobody was told how {name} ended"
    if run.made.calm:
        yield from _of_calm(run, books)


def _of_who_serves(run: Run, states: list[Rollout], route: Route) -> Iterator[str]:
    if route.candidate is not None:
        yield f"3: v{route.candidate} is still a candidate: {route}"
    promoted = [state for state in states if state.phase is Phase.PROMOTED]
    last = max(promoted, key=lambda state: state.epoch).candidate if promoted else (None if run.made.first else "1")
    if route.stable != last:
        yield f"3: v{route.stable} serves, the ledger's last proven version is v{last}"
    if route.stable and run.registry.aliases.get("champion") != route.stable:
        yield f"3: v{route.stable} serves, the champion is v{run.registry.aliases.get('champion')}"
    running = {version for model, version in run.target.versions if model == MODEL}
    if running != ({route.stable} - {None}):
        yield f"3: versions {sorted(running)} run, v{route.stable} serves"


def _of_calm(run: Run, books: dict[str, list[Entry]]) -> Iterator[str]:
    """1, 2: with nothing worse than short outages of the telemetry, each version gets what it deserves."""
    superseding = run.made.policy.rollout.on_conflict == "supersede"
    for each in run.delivered:
        if each.refused:
            continue
        state = fold(books[each.rollout])
        assert state is not None
        errors = {"1": 0.0, **run.made.errors}
        bad = state.stable is not None and errors[state.candidate] > errors[state.stable]
        wanted = Phase.ROLLED_BACK if bad else Phase.PROMOTED
        if state.phase is not wanted and not (superseding and "superseded" in state.reason):
            deserved = "bad" if bad else "good"
            yield f"1: {each.rollout} ended as {state.phase} ({state.reason}), its version is {deserved}"
