"""Tells the Prefect server what the ledger holds: an event per transition of a rollout, in the ledger's order, and a
form for each question that people are asked.

Told from the ledger alone, whoever drives the rollout, so that nothing is lost with a controller and no decision waits
for Prefect. How far it was told is kept on the server, where several relays look before they tell: what is told twice
is the same event there for minutes only, and would later set off automations again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from flows.form import Forms, Wanted, wanted
from flows.story import readable, run_of, weights
from policies import audit
from policies.events import KINDS, from_body
from policies.rollout import Rollout, step
from policies.transitions import transitions
from serving.log import say
from tasks.ports import Ledger
from tasks.ports_monitor import Herald, Notice

_EVERY_S = 1.0
_FORMS_EVERY_S = 5.0


@dataclass
class Relay:
    """Call `pass_on` again and again; it goes on where it, or another, has stopped."""

    ledger: Ledger
    herald: Herald
    forms: Forms | None = None
    at: int | None = None  # the entry up to which all is told
    _first: int | None = None  # the ledger's end when this relay began
    _to_note: bool = False
    _told: int | None = None  # the entry up to which whoever it was had told all, as this pass found it
    _rollouts: dict[str, tuple[Rollout, str | None]] = field(default_factory=dict)  # not settled; with their flow runs
    _asked: list[Wanted] | None = None
    _keep_at: float = 0.0

    def pass_on(self) -> int:
        """Tells what is new; how many events that were. Raises PortError, and goes on from there the next time."""
        if self.at is None:
            self.at = self._begin()
        told, self._told = 0, None
        for line in self.ledger.lines(self.at):
            entry = audit.parse(line)
            told += self._take_in(entry)
            self.at = int(entry["number"])  # not before it is told
            self._to_note = self._to_note or told > 0
        if self._to_note:
            if self._told_up_to() < self.at:
                self.herald.note_told(self.at)
            self._to_note = False
        self._keep_forms()
        return told

    def _keep_forms(self) -> None:
        """Looked at again and again: a form may be cancelled, or suspend just after its question was answered."""
        asked = wanted({name: state for name, (state, _) in self._rollouts.items()})
        if self.forms is not None and (asked != self._asked or time.monotonic() >= self._keep_at):
            self.forms.keep(asked)
            self._asked, self._keep_at = asked, time.monotonic() + _FORMS_EVERY_S

    def _begin(self) -> int:
        """Where the last one stopped. Where none was, history is no news, except that of rollouts under way."""
        head = self.ledger.head().number
        if self._first is None:
            self._first = head  # what comes while the server does not answer is news
        known = self.herald.told_up_to()
        under_way = [self.ledger.read(name) for name in self.ledger.unsettled()]
        if known is None or known > head:
            known = min([self._first, *(entries[0].number - 1 for entries in under_way if entries)])
            self.herald.note_told(known)
        for entries in under_way:
            before = [entry for entry in entries if entry.number <= known]
            state = readable(before)
            if state is not None:
                self._rollouts[before[0].rollout] = (state, run_of(before))
        return known

    def _take_in(self, entry: Mapping[str, Any]) -> int:
        """Tells what the entry made of its rollout; how many events that were."""
        name, kind = entry["rollout"], entry["kind"]
        if kind not in KINDS:
            return 0
        before: Rollout | None
        if name in self._rollouts:
            before, run = self._rollouts[name]
        else:  # it is new, or was settled when this relay began
            entries = self.ledger.read(name)
            before, run = readable(entries[: entry["sequence"] - 1]), run_of(entries)
        try:
            event = from_body(kind, entry["body"], entry["at"], entry["number"])
            after, _ = step(before, event)
        except (ValueError, TypeError, KeyError):  # another version of lockgate wrote it: its rollout is not told of
            self._rollouts.pop(name, None)
            return 0
        moves = transitions(before, event, after)
        new = bool(moves) and self._is_news(entry["number"])
        for move in moves if new else ():
            self._tell(entry, move, after, run)
        self._rollouts[name] = (after, run)
        if after.settled:
            del self._rollouts[name]
        return len(moves) if new else 0

    def _is_news(self, number: int) -> bool:
        """Whether no other relay has told it meanwhile: asked once in a pass, and only where there is something."""
        if self._told is None:
            self._told = self._told_up_to()
        return number > self._told

    def _told_up_to(self) -> int:
        known = self.herald.told_up_to()
        return known if known is not None and known <= self.ledger.head().number else 0

    def _tell(self, entry: Mapping[str, Any], name: str, state: Rollout, run: str | None) -> None:
        body = entry["body"]
        share, copies = weights(state) or (None, None)
        said = next((str(body[key]) for key in ("says", "error", "reason") if body.get(key)), state.reason)
        payload = {
            "rollout": entry["rollout"],
            "stage": state.label,
            "share": share,
            "copies": copies,
            "baseline": state.stable,
            "reason": said,
            "says": f"{state.model} v{state.candidate}: {name.replace('_', ' ')}: {said}".removesuffix(": "),
            "by": body.get("by") or entry["actor"],
            "entry": entry["number"],
        }
        key, event = f"{entry['rollout']}:{entry['number']}", f"lockgate.rollout.{name}"
        self.herald.tell(Notice(key, event, state.model, state.candidate, entry["at"], payload, entry["rollout"], run))


def keep_relaying(relay: Callable[[], Relay], every_s: float = _EVERY_S) -> NoReturn:
    """Passes on as long as the process lives; prints what stands in the way, once, and goes on whatever it is."""
    made: Relay | None = None
    last = ""
    while True:
        try:
            made = made or relay()
            made.pass_on()
            last = ""
        except Exception as exc:  # noqa: BLE001 - this is a thread that nobody restarts
            said = f"{type(exc).__name__}: {exc}"
            if said != last:
                say(f"events are told later: {said}")
            last = said
        time.sleep(every_s)
