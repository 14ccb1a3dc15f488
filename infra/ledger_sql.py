"""The ledger on SQLite (by default) or PostgreSQL.

An append takes the ledger's lock, reads the last entry, and writes the next one; it is on disk when it returns
(SQLite: WAL with synchronous=FULL; PostgreSQL: synchronous_commit). Whoever waits for the lock, or for a statement,
waits a limited time, and a PostgreSQL session that stops in the middle of an append is ended by the server.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from infra import ledger_schema as schema
from infra.ledger_connections import engine
from policies import audit, quarantine
from policies.audit import Head
from policies.events import from_body
from policies.rollout import Rollout, fold
from tasks.ports import BadInput, Entry, NotThere, PortError, Quarantine, Refused

_PAGE = 1000  # entries read at a time when all are read
_TRIES = 20


class SqlLedger:
    """`tasks.ports.Ledger` on `sqlite:///path` or `postgresql://user@host/database`.

    `now` dates what comes without a time of its own (quarantines). Safe to share between threads.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self._engine = engine(url)
        self._writing = self._engine.execution_options(writes=True)
        self._where = self._engine.url.render_as_string(hide_password=True)
        self._now = now
        self._made = False
        self._making = threading.Lock()

    def close(self) -> None:
        """Gives the connections back. The ledger can still be used; it connects anew."""
        self._engine.dispose()

    # ------------------------------------------------------------ entries

    def append(self, rollout: str, sequence: int, at: float, actor: str, kind: str, body: Mapping[str, Any]) -> Entry:
        text, again = _usable(rollout, at, actor, kind, body)
        with self._write() as connection:
            there = self._last_sequence(connection, rollout)
            if sequence != there + 1:
                raise Refused(f"{rollout}: entry {sequence} cannot be written, the next one is {there + 1}")
            return self._insert(connection, rollout, sequence, at, actor, kind, text, again)

    def read(self, rollout: str, after: int = 0) -> list[Entry]:
        table = schema.entries
        wanted = sa.select(table).where(table.c.rollout == rollout, table.c.sequence > after)
        with self._read() as connection:
            return [_entry(row) for row in connection.execute(wanted.order_by(table.c.sequence))]

    def last(self, rollout: str, count: int) -> list[Entry]:
        table = schema.entries
        wanted = sa.select(table).where(table.c.rollout == rollout).order_by(table.c.sequence.desc()).limit(count)
        with self._read() as connection:
            return [_entry(row) for row in connection.execute(wanted)][::-1]

    def head(self) -> Head:
        with self._read() as connection:
            return self._head(connection)

    def lines(self, after: int = 0) -> Iterator[bytes]:
        table = schema.entries
        if after == 0:
            self._sound()
        while True:
            page = sa.select(table).where(table.c.number > after).order_by(table.c.number).limit(_PAGE)
            with self._read() as connection:
                rows = connection.execute(page).all()
            for row in rows:
                yield line_of(*row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].number

    def _sound(self) -> None:
        """A damaged index would hide entries from `read` that `lines` still has; only SQLite itself can tell."""
        if self._engine.dialect.name != "sqlite":
            return
        with self._read() as connection:
            said = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        if said != "ok":
            raise PortError(f"the ledger at {self._where} was damaged: {said}; restore it from a backup")

    def _insert(
        self,
        connection: sa.Connection,
        rollout: str,
        sequence: int,
        at: float,
        actor: str,
        kind: str,
        text: str,
        again: Mapping[str, Any],
    ) -> Entry:
        head = self._head(connection)
        number = head.number + 1
        own = audit.seal(audit.line(number, rollout, sequence, at, actor, kind, text, head.hash))
        row = {
            "number": number,
            "rollout": rollout,
            "sequence": sequence,
            "at": float(at),
            "actor": actor,
            "kind": kind,
            "body": text,
            "previous_hash": head.hash,
            "hash": own,
        }
        connection.execute(sa.insert(schema.entries).values(row))
        return Entry(number, rollout, sequence, float(at), actor, kind, again, head.hash, own)

    def _head(self, connection: sa.Connection) -> Head:
        table = schema.entries
        last = sa.select(sa.func.max(table.c.number)).scalar_subquery()
        row = connection.execute(sa.select(table.c.number, table.c.hash).where(table.c.number == last)).first()
        return Head(row.number, row.hash) if row else Head()

    def _last_sequence(self, connection: sa.Connection, rollout: str) -> int:
        table = schema.entries
        wanted = (
            sa.select(table.c.sequence).where(table.c.rollout == rollout).order_by(table.c.sequence.desc()).limit(1)
        )
        return connection.execute(wanted).scalar() or 0

    # ------------------------------------------------------------ rollouts

    def rollouts(self, model: str | None = None, active: bool = False) -> list[str]:
        if not active:
            return self._requests(model)
        return [name for name in self._requests(model, settled=False) if not self._known_ended(name)]

    def unsettled(self) -> list[str]:
        return [name for name in self._requests(None, settled=False) if not self._known_settled(name)]

    def _requests(self, model: str | None, settled: bool = True) -> list[str]:
        """The names of the rollouts, newest first; with `settled` False, without those known to be settled."""
        table = schema.entries
        wanted = sa.select(table.c.rollout).where(sa.text(schema.IS_REQUEST)).order_by(table.c.number.desc())
        if model is not None:
            wanted = wanted.where(sa.literal_column(schema.MODEL_OF[self._engine.dialect.name]) == model)
        if not settled:
            wanted = wanted.where(~sa.exists().where(schema.settled.c.rollout == table.c.rollout))
        with self._read() as connection:
            return list(connection.execute(wanted).scalars())

    def _known_ended(self, name: str) -> bool:
        state = self._state(name)
        if state is not None and state.settled:
            self._remember_settled(name)
        return state is not None and state.ended

    def _known_settled(self, name: str) -> bool:
        state = self._state(name)
        if state is None or not state.settled:
            return False
        self._remember_settled(name)
        return True

    def _state(self, name: str) -> Rollout | None:
        """The rollout's state; None where its entries make no sense, which somebody then has to look at."""
        try:
            return fold(from_body(entry.kind, entry.body, entry.at, entry.number) for entry in self.read(name))
        except (ValueError, TypeError, KeyError):
            return None

    def _remember_settled(self, name: str) -> None:
        with contextlib.suppress(PortError), self._write() as connection:
            # It can be found out again: a ledger that can only be read is no reason not to read it.
            connection.execute(self._unless_there(schema.settled, rollout=name))

    # ------------------------------------------------------------ claims

    def claim(self, model: str, target: str, rollout: str, in_line: bool = False) -> str:
        with self._read() as connection:  # those who wait ask again and again, and must not keep others from writing
            line = self._line(connection, model, target)
            holder = self._holder(connection, model, target)
        if not in_line or rollout in line:
            if holder is not None:
                return holder
            if in_line and line[0] != rollout:
                return line[0]
        for _ in range(_TRIES):
            with self._write() as connection:
                if in_line and self._holder(connection, model, target) != rollout:
                    self._join(connection, model, target, rollout)
                    line = self._line(connection, model, target)
                if not in_line or line[:1] == [rollout]:
                    mine = self._unless_there(schema.claims, model=model, target=target, rollout=rollout)
                    connection.execute(mine)
                holder = self._holder(connection, model, target)
                if holder == rollout:
                    connection.execute(sa.delete(schema.queue).where(schema.queue.c.rollout == rollout))
            if holder is None and in_line:
                return line[0]
            if holder is not None:  # else it was released between the two statements: try again
                return holder
        raise PortError(f"{self._where}: the claim on {model} at {target} changes hands too fast")

    def _holder(self, connection: sa.Connection, model: str, target: str) -> str | None:
        table = schema.claims
        wanted = sa.select(table.c.rollout).where(table.c.model == model, table.c.target == target)
        return connection.execute(wanted).scalar()

    def _line(self, connection: sa.Connection, model: str, target: str) -> list[str]:
        """Who waits, the first first."""
        table = schema.queue
        wanted = sa.select(table.c.rollout).where(table.c.model == model, table.c.target == target)
        return list(connection.execute(wanted.order_by(table.c.place)).scalars())

    def _join(self, connection: sa.Connection, model: str, target: str, rollout: str) -> None:
        last = connection.execute(sa.select(sa.func.max(schema.queue.c.place))).scalar() or 0
        mine = self._unless_there(schema.queue, rollout=rollout, model=model, target=target, place=last + 1)
        connection.execute(mine)

    def release(self, model: str, target: str, rollout: str, unbegun: bool = False) -> None:
        with self._write() as connection:
            for table in (schema.claims, schema.queue):
                mine = sa.delete(table).where(
                    table.c.model == model, table.c.target == target, table.c.rollout == rollout
                )
                if unbegun:
                    mine = mine.where(~sa.exists().where(schema.entries.c.rollout == rollout))
                connection.execute(mine)

    # ------------------------------------------------------------ quarantine

    def quarantine(self, digest: str, reason: str, rollout: str) -> None:
        self._note(digest, rollout, quarantine.QUARANTINED, quarantine.put_in(digest, reason, rollout), False)

    def quarantined(self, digest: str) -> str | None:
        with self._read() as connection:
            standing = self._standing(connection, quarantine.book(digest))
        return standing[0].reason if standing else None

    def quarantines(self) -> list[Quarantine]:
        with self._read() as connection:
            return self._standing(connection)

    def lift(self, digest: str, reason: str, actor: str) -> None:
        try:
            body = quarantine.lifted(digest, reason)
        except ValueError as exc:
            raise BadInput(str(exc)) from exc
        if not self._note(digest, actor, quarantine.LIFTED, body, True):
            raise NotThere(f"the bytes {digest} are not in quarantine")

    def _note(self, digest: str, actor: str, kind: str, body: Mapping[str, Any], there: bool) -> bool:
        """Writes the entry if the bytes are in quarantine (`there`), or are not; says whether it did."""
        name, at = quarantine.book(digest), self._now()
        text, again = _usable(name, at, actor, kind, body)
        with self._write() as connection:
            if bool(self._standing(connection, name)) is not there:
                return False
            sequence = self._last_sequence(connection, name) + 1
            self._insert(connection, name, sequence, at, actor, kind, text, again)
            return True

    def _standing(self, connection: sa.Connection, name: str | None = None) -> list[Quarantine]:
        """What is in quarantine: of all digests, or of the one whose entries stand under `name`."""
        table = schema.entries
        wanted = sa.select(table.c.at, table.c.kind, table.c.body).where(sa.text(schema.IS_QUARANTINE))
        wanted = wanted.order_by(table.c.number) if name is None else wanted.where(table.c.rollout == name)
        rows = connection.execute(wanted.order_by(table.c.sequence) if name is not None else wanted)
        kept = quarantine.standing((row.at, row.kind, audit.parse(row.body)) for row in rows)
        return [Quarantine(digest, body["reason"], body["rollout"], at) for digest, (at, body) in kept.items()]

    # ------------------------------------------------------------ the database

    @contextlib.contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        self._make()
        with self._mapped(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """A transaction that nobody else's can come between; durable at the end."""
        self._make()
        with self._mapped(), self._writing.begin() as connection:
            yield connection

    def _make(self) -> None:
        with self._making:
            if self._made:
                return
            with self._mapped(), self._writing.begin() as connection:
                schema.create(connection)
            self._made = True

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        """The database's errors as the port's: whatever it was, another try may help."""
        try:
            yield
        except (sa.exc.SQLAlchemyError, UnicodeDecodeError) as exc:  # the latter: a damaged SQLite file
            said = str(getattr(exc, "orig", None) or exc).strip()
            raise PortError(f"the ledger at {self._where} cannot be used: {said}") from exc

    def _unless_there(self, table: sa.Table, **values: Any) -> sa.Executable:
        if self._engine.dialect.name == "sqlite":
            return sqlite.insert(table).values(values).on_conflict_do_nothing()
        return postgresql.insert(table).values(values).on_conflict_do_nothing()


def _usable(rollout: str, at: float, actor: str, kind: str, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The body as text and as it will be read. Raises BadInput for anything that could not be read as written."""
    try:
        return audit.written_entry(rollout, at, actor, kind, body)
    except audit.NotCanonical as exc:
        raise BadInput(f"{rollout}: {exc}") from exc


def _entry(row: sa.Row[Any]) -> Entry:
    try:
        body = audit.parse(row.body)
    except ValueError as exc:
        raise PortError(f"entry {row.number} of the ledger was damaged ({exc}); see: lockgate audit verify") from exc
    return Entry(
        row.number, row.rollout, row.sequence, row.at, row.actor, row.kind, body, row.previous_hash, row.hash
    )  # fmt: skip


def line_of(*row: Any) -> bytes:
    """The line of a stored row, its columns in the table's order: with the body exactly as it is stored.

    What no ledger has written (a byte that is not ASCII, a text where a number should be) goes out, too, and fails
    the check there.
    """
    number, rollout, sequence, at, actor, kind, body, previous_hash, own_hash = row
    try:
        text = audit.line(number, rollout, sequence, at, actor, kind, body, previous_hash, own_hash)
    except (TypeError, ValueError):
        text = repr(row)
    return text.encode("utf-8", "surrogatepass") + b"\n"
