"""The interpreter of the rollout machine: events into the ledger, effects into the world, in that order.

A `Controller` drives one rollout from wherever its ledger says that it stands. Each event is durable before its
effects are carried out; each effect names the entry that asked for it. Killed anywhere, the next controller goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.runner import Runner
from flows.story import evidence_of, fold, policy_of, readable
from policies import approval, audit, gates, rollout
from policies.events import (
    LOOKED_AT,
    Checked,
    Do,
    Done,
    Effect,
    Event,
    Failed,
    Looked,
    Lost,
    Phase,
    Taken,
    Ticked,
    from_body,
    to_body,
)
from policies.evidence import Evidence
from policies.nearest import nearest
from policies.policy import Policy
from policies.rollout import Rollout
from policies.traffic import Route
from policies.verdict import GateReport, Verdict, worst
from tasks.deployment import deploy, deployment, undeploy
from tasks.evidence import Lookout
from tasks.outcome import quarantine, set_champion, tell
from tasks.ports import BadInput, Entry, NotThere, PortError, Ports, Refused
from tasks.registration import fetch
from tasks.traffic import route_for, set_traffic

_RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
_CAN_BE_LOST = frozenset({*LOOKED_AT, Phase.PROMOTING})
_POLL_S = 0.05
_FLUSH_S = 30.0  # how long an ended rollout's controller waits for the outbox; `reconcile` goes on with the rest


class Superseded(Exception):
    """Another controller holds this rollout now; this one has stopped, and has done no harm."""


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after each event. `nearest` says of each report what would have changed it."""

    rollout: str
    state: Rollout
    event: Event
    reports: tuple[GateReport, ...] = ()
    evidence: Evidence | None = None
    nearest: Callable[[], tuple[str, ...]] = tuple


Observer = Callable[[Progress], None]
Watched = Callable[[str], AbstractContextManager[Observer]]  # who watches the rollout, as long as it is driven
Checks = Callable[[Rollout, Policy], Sequence[GateReport]]


def unwatched(_rollout: str) -> AbstractContextManager[Observer]:
    """Nobody watches the rollout."""
    return nullcontext(lambda _progress: None)


@dataclass
class Controller:
    """Drives one rollout to its end. `who` names this controller in the ledger; it must be unique to the process."""

    ports: Ports
    rollout: str
    who: str
    run: Runner
    checks: Checks
    observe: Observer = lambda _progress: None

    def drive(self) -> Rollout:
        """The rollout's state once it has ended and nothing is left to be done (or the rest must be left to others).

        Raises Superseded when another controller took over, PortError when the ledger cannot be reached.
        """
        self._load()
        self._append(Taken(0.0, 0, self.who))
        self._adopt()
        flush_until: float | None = None
        while not self.state.settled:
            if self.state.ended and not self.state.pending:
                flush_until = flush_until or self.ports.clock.now() + _FLUSH_S
                if not self._flush() and self.ports.clock.now() >= flush_until:
                    break
            elif self.state.in_force:
                self.run(stage, self, name=f"{self.state.label}")
            elif self.state.pending:
                self._advance()
            else:  # people are asked, and nothing is live yet
                self._wait(self.policy.rollout.look_every)
                self._catch_up()
        return self.state

    # ------------------------------------------------------------ the ledger

    def _load(self) -> None:
        entries = self.ports.ledger.read(self.rollout)
        state = fold(entries)
        if state is None:
            raise ValueError(f"the ledger has no rollout '{self.rollout}'")
        self.state = state
        self.sequence = entries[-1].sequence
        self.policy = policy_of(entries)
        self.gates = gates.begin(self.policy)
        for entry in entries:
            self._learn(entry)
        self.lookout = Lookout(self.ports.telemetry, self.policy)
        self.tries = 0
        self.had_share = False  # saw the candidate's share in force: if that has ended since, no other one is given
        self.outbox_at: dict[str, tuple[int, float]] = {}
        self.sending: tuple[Effect, Future[None]] | None = None  # out of the outbox, beside the looks

    def _append(
        self,
        event: Event,
        extra: Mapping[str, Any] | None = None,
        reports: tuple[GateReport, ...] = (),
        evidence: Evidence | None = None,
        nearest: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Makes the event durable, then lets the machine take it. Somebody else's entries are taken in first."""
        kind, body = to_body(event)
        body = audit.clean({**body, **(extra or {})})  # errors, tags, names of columns: they come from anywhere
        while True:
            now = self.ports.clock.now()
            rollout.step(self.state, replace(event, at=now))  # what the machine would refuse is never written
            try:
                entry = self.ports.ledger.append(self.rollout, self.sequence + 1, now, self.who, kind, body)
                break
            except Refused:
                self._catch_up()
        self.sequence = entry.sequence
        written = from_body(entry.kind, entry.body, entry.at, entry.number)
        before = self.state.moved_by
        self.state, _ = rollout.step(self.state, written)
        if self.state.moved_by != before:
            self.tries = 0
        self.observe(Progress(self.rollout, self.state, written, reports, evidence, nearest))

    def _catch_up(self) -> None:
        """Takes in what others wrote: a person's order is obeyed; another controller's claim ends this one."""
        for entry in self.ports.ledger.read(self.rollout, after=self.sequence):
            event = from_body(entry.kind, entry.body, entry.at, entry.number)
            if isinstance(event, Taken) and event.by != self.who:
                raise Superseded(f"{event.by} has taken over rollout {self.rollout}")
            self.state, _ = rollout.step(self.state, event)
            self.sequence = entry.sequence
            self._learn(entry)
            self.observe(Progress(self.rollout, self.state, event))

    def _learn(self, entry: Entry) -> None:
        """What a look on the record has shown weighs in all later ones, whoever looked."""
        evidence = evidence_of(entry)
        if evidence is not None:
            self.gates, _ = gates.look(self.policy, int(entry.body["stage"]), self.gates, evidence)

    def _try_append(self, event: Event, **extra: Any) -> bool:
        """As `_append`, for an event that somebody else's order may have overtaken: then the order stands."""
        try:
            self._append(event, **extra)
        except rollout.Illegal:
            self.observe(Progress(self.rollout, self.state, event))
            return False
        return True

    # ------------------------------------------------------------ taking over

    def _adopt(self) -> None:
        """Does the world agree with the ledger? A route that was taken back while nobody looked is a loss."""
        if not (self.state.in_force and self.state.stable):
            return
        route = self.ports.router.current(self.state.model)
        if route is None or route.epoch != self.state.epoch or route.candidate != self.state.candidate:
            self._append(Lost(0.0, 0, "the traffic was taken back while no controller looked after the rollout"))

    # ------------------------------------------------------------ effects

    def _advance(self) -> None:
        """Carries out what the rollout waits for; what fails is tried again until the machine's time for it is up."""
        effect = self.state.pending[0]
        try:
            outcome = self._carry_out(effect)
        except PortError as exc:
            final = isinstance(exc, (BadInput, NotThere, Refused))
            if isinstance(exc, Refused) and self._taken_back(effect):
                self._try_append(Lost(0.0, 0, f"the traffic was taken back: {exc}"))
                return
            self._try_append(Failed(0.0, 0, effect.id, str(exc), final))
            if not final:
                self._wait(_RETRY_S[min(self.tries, len(_RETRY_S) - 1)])
                self.tries += 1
            return
        self._try_append(outcome[0], **outcome[1])

    def _taken_back(self, effect: Effect) -> bool:
        """Whether the stable version has the traffic to itself again: then a refused route is no riddle but a loss."""
        if self.state.phase not in _CAN_BE_LOST or effect.do is not Do.ROUTE or self.state.stable is None:
            return False
        try:
            route = self.ports.router.current(self.state.model)
        except PortError:
            return False
        return route is not None and route.stable == self.state.stable and route.candidate is None

    def _carry_out(self, effect: Effect) -> tuple[Event, dict[str, Any]]:
        done = (Done(0.0, 0, effect.id), dict[str, Any]())
        if effect.do is Do.CHECK:
            reports = self._outdated() or tuple(self.checks(self.state, self.policy))
            verdict = worst(report.verdict for report in reports)
            extra = {"reports": [dict(vars(report)) for report in reports]}
            checked = Checked(0.0, 0, _settle(verdict), _because(verdict, reports), self._shown_hash(extra))
            return checked, {"extra": extra, "reports": reports}
        if effect.do is Do.DEPLOY:
            self._ensure_stable(effect)
            self._deploy(self.state.candidate, self.state.digest, self.state.signed)
            return done
        assert effect.do is Do.ROUTE
        route = route_for(self.state, effect, self.policy.rollout, self.had_share)
        self.run(set_traffic, self.ports.router, route, name=_route_name(self.state, effect))
        return done

    def _outdated(self) -> tuple[GateReport, ...]:
        """What has changed since the request so that it cannot go on: another rollout may have been first."""
        why = self.ports.ledger.quarantined(self.state.digest)
        if why is not None:
            return (GateReport("quarantine", Verdict.FAIL, f"these bytes are in quarantine: {why}"),)
        route = self.ports.router.current(self.state.model)
        if route is not None and route.stable not in (None, self.state.stable):
            meant = f"v{self.state.stable}" if self.state.stable else "nothing"
            says = f"v{route.stable} serves now, {meant} did when this rollout was requested; deliver it anew"
            return (GateReport("baseline", Verdict.FAIL, says),)
        return ()

    def _ensure_stable(self, effect: Effect) -> None:
        """A champion that the registry names but nobody serves is started, before anything is compared with it."""
        model, stable = self.state.model, self.state.stable
        route = self.ports.router.current(model)
        if stable is None or (route is not None and route.stable == stable):
            return
        self._deploy(stable, self.ports.registry.version(model, stable).digest)
        alone = Route(model, stable=stable, epoch=effect.asked_by, timeout_s=self.policy.rollout.timeout)
        self.run(set_traffic, self.ports.router, alone, name=f"route: v{stable} alone")

    def _deploy(self, number: str, digest: str, signed: str = "") -> None:
        model = self.state.model
        onnx = self.ports.target.stored(digest)
        if onnx is None:
            version = self.ports.registry.version(model, number)
            onnx = self.run(fetch, self.ports.registry, version, name=f"fetch v{number}").onnx
        wanted = deployment(self.policy, model, number, digest, onnx, signed=signed)
        self.run(deploy, self.ports.target, wanted, name=f"deploy v{number}")

    def _flush(self) -> bool:
        """Tries one thing that is due in the outbox; true if that is done.

        It is sent beside the looks, one after the other: a registry that hangs costs no lease and delays no verdict.
        """
        if self.sending is None and (due := self._next_due()) is not None:
            self.sending = due, self.ports.clock.beside(partial(self._send, due, self.state))
        if self.sending is None:
            if self.state.ended:
                self._wait(_RETRY_S[0])
            return False
        effect, sent = self.sending
        while not sent.done():
            if self.state.in_force:
                return False
            self.ports.clock.sleep(_POLL_S)
        self.sending = None
        try:
            sent.result()
        except PortError as exc:
            if isinstance(exc, (BadInput, NotThere, Refused)) and effect.do is not Do.QUARANTINE:
                self._try_append(Failed(0.0, 0, effect.id, str(exc), final=True))
                return True
            # It stays in the ledger as asked for and not done; whoever drives or reconciles tries again.
            tries, _ = self.outbox_at.get(effect.id, (0, 0.0))
            delay = _RETRY_S[min(tries, len(_RETRY_S) - 1)]
            self.outbox_at[effect.id] = (tries + 1, self.ports.clock.now() + delay)
            return False
        self._try_append(Done(0.0, 0, effect.id))
        return True

    def _next_due(self) -> Effect | None:
        now = self.ports.clock.now()
        return next((each for each in self.state.outbox if now >= self.outbox_at.get(each.id, (0, now))[1]), None)

    def _send(self, effect: Effect, state: Rollout) -> None:
        if not self._overtaken(effect, state):
            self._deliver(effect, state)

    def _overtaken(self, effect: Effect, state: Rollout) -> bool:
        """Whether a later rollout of the model has changed what the effect would: then there is nothing left to do.

        What is owed may be paid much later. By then another version may be the champion, or this one serve again.
        """
        if effect.do not in (Do.ALIAS, Do.UNDEPLOY) or not state.ended:
            return False
        ledger = self.ports.ledger
        for later in takewhile(lambda name: name != self.rollout, ledger.rollouts(state.model)):
            other = readable(ledger.read(later))
            if effect.do is Do.ALIAS or other is None or effect.version in (other.candidate, other.stable):
                return True
        return False

    def _deliver(self, effect: Effect, state: Rollout) -> None:
        ports = self.ports
        if effect.do is Do.ALIAS:
            assert effect.version is not None
            previous = state.stable if effect.version == state.candidate else None
            self.run(set_champion, ports.registry, state.model, effect.version, previous, name="set aliases")
        elif effect.do is Do.UNDEPLOY:
            assert effect.version is not None
            self.run(undeploy, ports.target, state.model, effect.version, name=f"undeploy v{effect.version}")
        elif effect.do is Do.QUARANTINE:
            self.run(quarantine, ports.ledger, self.rollout, state, effect.text, name="quarantine")
        else:
            alias = self.policy.trigger.alias
            self.run(tell, ports.registry, self.rollout, state, ports.clock.now(), alias, name=f"tell: {state.label}")

    # ------------------------------------------------------------ a stage

    def watch_stage(self) -> None:
        """Looks until the machine moves on."""
        moved_by = self.state.moved_by
        self.had_share = True

        def here() -> bool:
            return self.state.in_force and self.state.moved_by == moved_by

        while here():
            began = self.ports.clock.now()
            self._renew()
            if here():
                self._look()
            if here() and self.state.outbox:
                self._flush()
            if here():  # what a look has decided does not wait for the next one
                self._wait(self.policy.rollout.look_every - (self.ports.clock.now() - began))

    def _renew(self) -> None:
        if self.state.stable is None:
            return
        try:
            self.ports.router.renew(self.state.model, self.state.epoch)
        except Refused as exc:
            self._try_append(Lost(0.0, 0, f"the traffic was taken back: {exc}"))
        except PortError:
            # Whoever holds the route takes it back when the lease runs out; the next renewal then says so.
            self.observe(Progress(self.rollout, self.state, Ticked(self.ports.clock.now(), 0)))

    def _look(self) -> None:
        evidence = self.lookout.look(self.state, self.ports.clock.now())
        number = len(self.policy.rollout.stages) if self.state.phase is Phase.WATCHING else self.state.stage
        known, reports = gates.look(self.policy, number, self.gates, evidence)
        verdict = worst(report.verdict for report in reports)
        extra = {
            "stage": number,
            "reports": [dict(vars(report)) for report in reports],
            "evidence": asdict(evidence),
        }
        event = Looked(0.0, 0, verdict, _because(verdict, reports), self._shown_hash(extra))
        would = partial(_nearest, self.policy, number, self.gates, evidence, reports)
        if self._try_append(event, extra=extra, reports=reports, evidence=evidence, nearest=would):
            self.gates = known  # a look that is not on the record must not weigh in a later one that is

    def _shown_hash(self, shown: Mapping[str, Any]) -> str:
        """Binds an approval to what it was given on; only where the policy asks for any."""
        return approval.shown_hash(audit.clean(shown)) if self.state.terms.approvals else ""

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self.ports.clock.sleep(seconds)
        limit = rollout.due(self.state)
        if limit is not None and self.ports.clock.now() >= limit:
            self._try_append(Ticked(0.0, 0))


def _nearest(
    policy: Policy, stage: int, before: gates.State, evidence: Evidence, reports: tuple[GateReport, ...]
) -> tuple[str, ...]:
    return tuple(nearest(policy, stage, before, evidence, report) for report in reports)


def _settle(verdict: Verdict) -> Verdict:
    """A check has no next look: what holds has not passed."""
    return Verdict.FAIL if verdict is Verdict.HOLD else verdict


def _because(verdict: Verdict, reports: Sequence[GateReport]) -> str:
    """Why the verdict fell: the words of the gates that decided it."""
    if verdict is Verdict.PASS:
        return gates.summary(tuple(reports))
    deciding = [report for report in reports if report.verdict is verdict]
    return "; ".join(f"{report.gate}: {report.says}" for report in deciding) or "no gate has said anything"


def _route_name(state: Rollout, effect: Effect) -> str:
    if effect.version is not None:
        return f"route: v{effect.version} alone"
    return f"route: v{state.candidate} {effect.weight} % live, {effect.shadow} % shadow"


stage = task(name="stage", cache_policy=NO_CACHE)(Controller.watch_stage)
