"""The ledger on SQLite: the port's contract, durability, and what the database itself refuses."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.ledger_sql import SqlLedger
from policies import audit
from policies.events import Ordered
from tasks.ports import BadInput, PortError
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
