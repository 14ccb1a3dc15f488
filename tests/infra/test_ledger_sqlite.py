"""The ledger on SQLite: the port's contract, durability, and what the database itself refuses."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.ledger_sql import SqlLedger, line_of
from policies import audit
from policies.events import Ordered
from tasks.ports import BadInput, PortError
from tests.infra.tampering import COLUMNS, edits_of
from tests.ports.ledger_contract import NOW, Connect, LedgerContract, append, carry_out, request


class TestSqliteLedger(LedgerContract):
    @pytest.fixture
    def connect(self, tmp_path: Path) -> Iterator[Connect]:
        opened: list[SqlLedger] = []

        def connect() -> SqlLedger:
            opened.append(SqlLedger(f"sqlite:///{tmp_path / 'ledger.db'}", lambda: NOW))
            return opened[-1]

        yield connect
        for ledger in opened:
            ledger.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[SqlLedger]:
    ledger = SqlLedger(f"sqlite:///{path}")
    yield ledger
    ledger.close()


def test_the_database_refuses_every_change_of_an_entry(ledger: SqlLedger, path: Path) -> None:
    for sequence in (1, 2):
        ledger.append("r1", sequence, NOW, "t", "noted", {"n": sequence})
    before = list(ledger.lines())
    row = "SELECT number, rollout, sequence, at, 'x', kind, body, previous_hash, hash FROM lockgate_entries"
    row_as_third = row.replace("number,", "3,", 1)
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "UPDATE lockgate_entries SET actor = 'x'",
        "UPDATE lockgate_entries SET number = 7 WHERE number = 1",
        "DELETE FROM lockgate_entries WHERE number = 2",
        f"INSERT OR REPLACE INTO lockgate_entries {row} WHERE number = 1",
        f"INSERT OR REPLACE INTO lockgate_entries {row_as_third} WHERE number = 1",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            connection.execute(statement)
    connection.close()
    assert list(ledger.lines()) == before


def test_entries_are_on_disk_when_append_returns(ledger: SqlLedger) -> None:
    """WAL alone loses the last transactions in a power failure; only synchronous=FULL (2) syncs at each commit."""
    with ledger._write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_a_process_that_is_killed_right_after_an_append_loses_nothing(path: Path) -> None:
    code = (
        "import os, sys; from infra.ledger_sql import SqlLedger\n"
        "ledger = SqlLedger(sys.argv[1])\n"
        "for n in range(1, 6): ledger.append('r1', n, 1.0, 't', 'noted', {'n': n})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], check=False)
    assert done.returncode == -9
    ledger = SqlLedger(f"sqlite:///{path}")
    assert [entry.body["n"] for entry in ledger.read("r1")] == [1, 2, 3, 4, 5]
    assert ledger.append("r1", 6, 1.0, "t", "noted", {}).number == 6
    ledger.close()


def test_processes_that_start_at_once_make_one_ledger(path: Path) -> None:
    code = (
        "import sys; from infra.ledger_sql import SqlLedger\n"
        "ledger = SqlLedger(sys.argv[1]); sys.stdin.readline()\n"
        "ledger.append(sys.argv[2], 1, 1.0, 't', 'noted', {})"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, f"sqlite:///{path}", f"r{n}"], stdin=subprocess.PIPE)
        for n in range(4)
    ]
    for process in started:
        process.communicate(b"\n", timeout=60)
    assert [process.returncode for process in started] == [0] * 4
    ledger = SqlLedger(f"sqlite:///{path}")
    assert audit.verify(ledger.lines(), ledger.head()).head.number == 4
    ledger.close()


def test_folding_a_rollout_reads_its_own_entries_and_no_others(ledger: SqlLedger) -> None:
    """Each query that a rollout, a delivery or a look at the quarantine makes is answered by an index."""
    ledger.head()
    asked: list[tuple[str, object]] = []
    sa.event.listen(
        ledger._engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, parameters, *_rest: asked.append((statement, parameters)),
    )
    ledger.read("r1")
    ledger.rollouts("m", active=True)
    ledger.unsettled()
    ledger.quarantined("d1")
    ledger.quarantines()
    ledger.head()
    ledger.append("r1", 1, NOW, "t", "noted", {})
    queries = [(statement, parameters) for statement, parameters in asked if statement.startswith("SELECT")]
    assert len(queries) >= 7
    with ledger._read() as connection:
        for statement, parameters in queries:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            for step in plan:
                assert not step.detail.startswith("SCAN lockgate_entries") or "USING INDEX" in step.detail, statement


def test_settled_rollouts_are_folded_once(ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    append(ledger, "r1", 1, request())
    carry_out(ledger, "r1")
    append(ledger, "r1", len(ledger.read("r1")) + 1, Ordered(0.0, 0, "abort"))
    assert carry_out(ledger, "r1").settled
    read: list[str] = []
    original = ledger.read
    monkeypatch.setattr(ledger, "read", lambda name: read.append(name) or original(name))
    for _ in range(3):
        assert ledger.unsettled() == []
        assert ledger.rollouts(active=True) == []
    assert read == ["r1"]


def test_what_cannot_be_a_ledger_is_refused_by_name() -> None:
    for url, named in (
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("mysql://u@h/d", "mysql"),
        ("no url", "URL"),
    ):
        with pytest.raises(BadInput, match=named):
            SqlLedger(url)


def test_a_ledger_that_cannot_be_used_says_so_and_shows_no_password(tmp_path: Path) -> None:
    broken = tmp_path / "ledger.db"
    broken.write_bytes(b"this is not a database, and has never been one" * 100)
    ledger = SqlLedger(f"sqlite:///{broken}")
    with pytest.raises(PortError, match=r"ledger\.db cannot be used: file is not a database"):
        ledger.head()
    ledger.close()
    nobody = SqlLedger("postgresql://u:secret@127.0.0.1:1/d")
    with pytest.raises(PortError, match="cannot be used") as told:
        nobody.head()
    assert "secret" not in str(told.value)
    nobody.close()


def test_a_full_disk_is_a_port_error_and_the_entry_is_not_there(ledger: SqlLedger) -> None:
    ledger.append("r1", 1, NOW, "t", "noted", {})
    with ledger._read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    limit = f"PRAGMA max_page_count = {pages}"
    sa.event.listen(ledger._engine, "begin", lambda connection: connection.exec_driver_sql(limit))
    with pytest.raises(PortError, match="full"):
        ledger.append("r1", 2, NOW, "t", "noted", {"filler": "x" * 100_000})
    assert [entry.sequence for entry in ledger.read("r1")] == [1]
    assert ledger.append("r1", 2, NOW, "t", "noted", {}).sequence == 2


# ---------------------------------------------------------------- edits of what is stored


def stored(path: Path) -> sqlite3.Connection:
    """The database without its triggers: what somebody with the file in hand can do."""
    connection = sqlite3.connect(path, isolation_level=None)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    return connection


def test_every_edit_of_every_stored_value_is_detected(ledger: SqlLedger, path: Path) -> None:
    for sequence in (1, 2, 3):
        ledger.append("r1", sequence, NOW + sequence, "t/1", "noted", {"n": sequence, "é": [None, 0.5]})
    head = ledger.head()
    connection = stored(path)
    tried = 0
    for place in (1, 3):
        for column in COLUMNS:
            (value,) = connection.execute(
                f"SELECT {column} FROM lockgate_entries WHERE number = ?", (place,)
            ).fetchone()
            for edited in edits_of(value):
                tried += 1
                connection.execute("BEGIN")
                try:
                    connection.execute(f"UPDATE lockgate_entries SET {column} = ? WHERE number = ?", (edited, place))
                except sqlite3.IntegrityError:
                    connection.execute("ROLLBACK")  # the place of another entry
                    continue
                rows = connection.execute(
                    f"SELECT {', '.join(COLUMNS)} FROM lockgate_entries ORDER BY number"
                ).fetchall()
                connection.execute("ROLLBACK")
                assert audit.verify((line_of(*row) for row in rows), head).breach is not None, (column, value, edited)
    assert tried > 3000
    assert audit.verify(ledger.lines(), head).breach is None
    connection.close()


@pytest.mark.parametrize("edited", [b"1.5", "\uff11.5", "1.5 s"])
def test_a_time_that_only_reads_as_the_number_that_was_written_is_detected(
    ledger: SqlLedger, path: Path, edited: object
) -> None:
    """SQLite stores in a column of numbers what is none, and Python's `float` takes more for a number than SQLite."""
    ledger.append("r1", 1, 1.5, "t", "noted", {})
    connection = stored(path)
    connection.execute("UPDATE lockgate_entries SET at = ?", (edited,))
    connection.close()
    found = audit.verify(ledger.lines(), ledger.head())
    assert found.breach is not None
    assert found.breach.number == 1


def test_every_deletion_swap_and_truncation_of_stored_entries_is_detected(ledger: SqlLedger, path: Path) -> None:
    """The cut at the end against the head that was known before; the first entry that does not fit is named."""
    for sequence in range(1, 6):
        ledger.append("r1", sequence, NOW + sequence, "t", "noted", {"n": sequence})
    head = ledger.head()
    connection = stored(path)
    before = path.with_suffix(".copy")
    for place in range(1, 6):
        backup = sqlite3.connect(before)
        connection.backup(backup)
        backup.execute("DELETE FROM lockgate_entries WHERE number = ?", (place,))
        backup.commit()
        backup.close()
        cut = SqlLedger(f"sqlite:///{before}")
        found = audit.verify(cut.lines(), head)
        assert found.breach is not None
        assert found.breach.number == place
        cut.close()
    for one in range(1, 6):
        for other in range(one + 1, 6):
            backup = sqlite3.connect(before)
            connection.backup(backup)
            for old, new in ((one, -1), (other, one), (-1, other)):
                backup.execute("UPDATE lockgate_entries SET number = ? WHERE number = ?", (new, old))
            backup.commit()
            backup.close()
            swapped = SqlLedger(f"sqlite:///{before}")
            found = audit.verify(swapped.lines(), head)
            assert found.breach is not None
            assert found.breach.number == one
            swapped.close()
    connection.close()


def test_a_damaged_entry_can_still_be_looked_at_and_the_ledger_goes_on(ledger: SqlLedger, path: Path) -> None:
    """Nothing that reaches for a rollback can be blocked: damage is told, it does not stop the other rollouts."""
    ledger.append("r1", 1, NOW, "t", "noted", {"n": 1})
    ledger.append("r2", 1, NOW, "t", "noted", {"n": 1})
    connection = stored(path)
    connection.execute("UPDATE lockgate_entries SET body = '{\"n\":1' WHERE number = 1")
    connection.close()
    with pytest.raises(PortError, match="entry 1 of the ledger was damaged"):
        ledger.read("r1")
    assert ledger.append("r2", 2, NOW, "t", "noted", {}).number == 3
    found = audit.verify(ledger.lines())
    assert found.breach is not None
    assert found.breach.number == 1


def test_bytes_of_the_file_that_were_changed_are_detected_or_make_no_difference(path: Path, tmp_path: Path) -> None:
    """Every 37th byte of the file, each in one bit: the check fails, or entries and folds are what they were."""
    ledger = SqlLedger(f"sqlite:///{path}")
    for sequence in (1, 2, 3):
        ledger.append("r1", sequence, NOW + sequence, "t", "noted", {"n": sequence, "x": "y" * 600})
    head, lines, entries = ledger.head(), list(ledger.lines()), ledger.read("r1")
    ledger.close()
    raw = path.read_bytes()
    detected = 0
    for place, offset in enumerate(range(0, len(raw), 37)):
        edited = tmp_path / f"{place}.db"
        edited.write_bytes(raw[:offset] + bytes([raw[offset] ^ (1 << place % 8)]) + raw[offset + 1 :])
        damaged = SqlLedger(f"sqlite:///{edited}")
        try:
            found = list(damaged.lines())
            if audit.verify(found, head).breach is None:
                assert (found, damaged.read("r1")) == (lines, entries), offset
            else:
                detected += 1
        except PortError:
            detected += 1
        finally:
            damaged.close()
            edited.unlink()
    assert detected > 20
