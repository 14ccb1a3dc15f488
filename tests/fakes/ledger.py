"""A fake Ledger in memory, with the real hash chain; it keeps the contract of `tests/ports`.

Faults: `down = True` makes every call raise PortError. `before(call)` runs first in each call and `after(call)` when
what it asked for is done, with the method's name; what they raise, the caller gets. So an error in `before` is a call
that never arrived, one in `after` a write that is durable although its answer was lost; anything else (a process that
dies: let them raise a BaseException) falls between two calls. They may also call the ledger: then somebody else came
first. `now` dates the quarantines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from policies import audit, quarantine
from policies.audit import Head
from policies.events import from_body
from policies.rollout import Rollout, fold
from tasks.ports import BadInput, Entry, NotThere, PortError, Quarantine, Refused


def _nothing(_call: str) -> None:
    """No fault."""


class FakeLedger:
    """`tasks.ports.Ledger` in memory. `entries` is the whole ledger, in order."""

    def __init__(self, now: Callable[[], float] = lambda: 0.0) -> None:
        self.now = now
        self.down = False
        self.before: Callable[[str], None] = _nothing
        self.after: Callable[[str], None] = _nothing
        self.entries: list[Entry] = []
        self._books: dict[str, list[Entry]] = {}
        self._claims: dict[tuple[str, str], str] = {}
        self._lines: dict[tuple[str, str], list[str]] = {}
        self._quarantines: list[Entry] = []
        self._settled: set[str] = set()
        self._lock = threading.RLock()

    def append(self, rollout: str, sequence: int, at: float, actor: str, kind: str, body: Mapping[str, Any]) -> Entry:
        self._up("append")
        with self._lock:
            there = len(self._books.get(rollout, ()))
            if sequence != there + 1:
                raise Refused(f"{rollout}: entry {sequence} cannot be written, the next one is {there + 1}")
            entry = self._add(rollout, at, actor, kind, body)
        self.after("append")
        return entry

    def read(self, rollout: str, after: int = 0) -> list[Entry]:
        self._up("read")
        found = self._books.get(rollout, [])[after:]
        self.after("read")
        return found

    def last(self, rollout: str, count: int) -> list[Entry]:
        self._up("last")
        return self._books.get(rollout, [])[-count:]

    def rollouts(self, model: str | None = None, active: bool = False) -> list[str]:
        self._up("rollouts")
        found = [
            name
            for name in self._requested()
            if (model is None or self._books[name][0].body.get("model") == model)
            and not (active and self._is(name, ended=True))
        ]
        self.after("rollouts")
        return found

    def unsettled(self) -> list[str]:
        self._up("unsettled")
        found = [name for name in self._requested() if not self._is(name, ended=False)]
        self.after("unsettled")
        return found

    def head(self) -> Head:
        self._up("head")
        head = self._head()
        self.after("head")
        return head

    def lines(self, after: int = 0) -> Iterator[bytes]:
        self._up("lines")
        for entry in self.entries[after:]:
            text = audit.line(
                entry.number,
                entry.rollout,
                entry.sequence,
                entry.at,
                entry.actor,
                entry.kind,
                audit.canonical(entry.body),
                entry.previous_hash,
                entry.hash,
            )
            yield text.encode() + b"\n"
        self.after("lines")

    def claim(self, model: str, target: str, rollout: str, in_line: bool = False) -> str:
        self._up("claim")
        with self._lock:
            holder = self._claims.get((model, target))
            line = self._lines.setdefault((model, target), [])
            if in_line and holder != rollout and rollout not in line:
                line.append(rollout)
            if holder is None:
                holder = line[0] if in_line else rollout
                if holder == rollout:
                    self._claims[model, target] = rollout
            if holder == rollout and rollout in line:
                line.remove(rollout)
        self.after("claim")
        return holder

    def release(self, model: str, target: str, rollout: str, unbegun: bool = False) -> None:
        self._up("release")
        with self._lock:
            begun = unbegun and bool(self._books.get(rollout))
            if self._claims.get((model, target)) == rollout and not begun:
                del self._claims[model, target]
            line = self._lines.get((model, target), [])
            if rollout in line and not begun:
                line.remove(rollout)
        self.after("release")

    def quarantine(self, digest: str, reason: str, rollout: str) -> None:
        self._up("quarantine")
        with self._lock:
            if digest not in self._standing():
                body = quarantine.put_in(digest, reason, rollout)
                self._add(quarantine.book(digest), self.now(), rollout, quarantine.QUARANTINED, body)
        self.after("quarantine")

    def quarantined(self, digest: str) -> str | None:
        self._up("quarantined")
        found = self._standing().get(digest)
        self.after("quarantined")
        return found.reason if found else None

    def quarantines(self) -> list[Quarantine]:
        self._up("quarantines")
        found = list(self._standing().values())
        self.after("quarantines")
        return found

    def lift(self, digest: str, reason: str, actor: str) -> None:
        self._up("lift")
        try:
            body = quarantine.lifted(digest, reason)
        except ValueError as exc:
            raise BadInput(str(exc)) from exc
        with self._lock:
            if digest not in self._standing():
                raise NotThere(f"the bytes {digest} are not in quarantine")
            self._add(quarantine.book(digest), self.now(), actor, quarantine.LIFTED, body)
        self.after("lift")

    def _up(self, call: str) -> None:
        if self.down:
            raise PortError("the ledger does not answer")
        self.before(call)

    def _head(self) -> Head:
        return Head(self.entries[-1].number, self.entries[-1].hash) if self.entries else Head()

    def _add(self, rollout: str, at: float, actor: str, kind: str, body: Mapping[str, Any]) -> Entry:
        try:
            text, again = audit.written_entry(rollout, at, actor, kind, body)
        except audit.NotCanonical as exc:
            raise BadInput(f"{rollout}: {exc}") from exc
        head, book = self._head(), self._books.get(rollout, [])
        number, sequence = head.number + 1, len(book) + 1
        own = audit.seal(audit.line(number, rollout, sequence, at, actor, kind, text, head.hash))
        entry = Entry(number, rollout, sequence, float(at), actor, kind, again, head.hash, own)
        self.entries.append(entry)
        self._books.setdefault(rollout, book).append(entry)
        if kind in (quarantine.QUARANTINED, quarantine.LIFTED):
            self._quarantines.append(entry)
        return entry

    def _requested(self) -> list[str]:
        firsts = [book[0] for book in self._books.values() if book[0].kind == "requested"]
        return [entry.rollout for entry in sorted(firsts, key=lambda entry: -entry.number)]

    def _is(self, name: str, ended: bool) -> bool:
        """Settled, or (with `ended`) at least ended; what makes no sense is neither."""
        if name in self._settled:
            return True
        state = self._state(name)
        if state is None:
            return False
        if state.settled:
            self._settled.add(name)
        return state.ended if ended else state.settled

    def _state(self, name: str) -> Rollout | None:
        try:
            return fold(from_body(entry.kind, entry.body, entry.at, entry.number) for entry in self._books[name])
        except (ValueError, TypeError, KeyError):
            return None

    def _standing(self) -> dict[str, Quarantine]:
        kept = quarantine.standing((entry.at, entry.kind, entry.body) for entry in self._quarantines)
        return {digest: Quarantine(digest, body["reason"], body["rollout"], at) for digest, (at, body) in kept.items()}
