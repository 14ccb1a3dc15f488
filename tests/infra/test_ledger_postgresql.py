"""The ledger on a real PostgreSQL server: the port's contract, the privileges, and a writer that stops half-way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import psycopg
import pytest
import sqlalchemy as sa

from infra import ledger_connections
from infra.ledger_privileges import grants, main
from infra.ledger_sql import SqlLedger, line_of
from policies import audit
from tasks.ports import PortError
from tests.infra.postgresql_server import postgresql, programs_or_skip
from tests.infra.tampering import COLUMNS, edits_of
from tests.ports.ledger_contract import NOW, Connect, LedgerContract

pytestmark = pytest.mark.e2e
_names = (f"ledger{n}" for n in itertools.count())
Open = Callable[..., SqlLedger]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql(programs_or_skip()) as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE ROLE worker LOGIN")
        yield url


@pytest.fixture
def url(server: str) -> str:
    """An empty database of the test's own."""
    name = next(_names)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    ledgers: list[SqlLedger] = []

    def open_ledger(at: str = url) -> SqlLedger:
        ledgers.append(SqlLedger(at, lambda: NOW))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


class TestPostgresqlLedger(LedgerContract):
    @pytest.fixture
    def connect(self, opened: Open) -> Connect:
        return opened


CHANGES = (
    "UPDATE lockgate_entries SET actor = 'x'",
    "DELETE FROM lockgate_entries WHERE number = 1",
    "TRUNCATE lockgate_entries",
    "INSERT INTO lockgate_entries SELECT * FROM lockgate_entries ON CONFLICT (number) DO UPDATE SET actor = 'x'",
)


def test_the_database_refuses_every_change_of_an_entry_even_to_its_owner(url: str, opened: Open) -> None:
    ledger = opened()
    ledger.append("r1", 1, NOW, "t", "noted", {})
    before = list(ledger.lines())
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in CHANGES:
            with pytest.raises(psycopg.errors.RaiseException, match="only grows"):
                connection.execute(statement)
    assert list(ledger.lines()) == before


def test_a_worker_with_the_granted_privileges_can_do_all_of_its_work_and_no_more(url: str, opened: Open) -> None:
    opened().head()
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in grants("worker"):
            connection.execute(statement)
    as_worker = url.replace("owner@", "worker@")
    ledger = opened(as_worker)
    ledger.append("r1", 1, NOW, "t", "noted", {})
    assert ledger.claim("m", "local", "r1") == "r1"
    ledger.release("m", "local", "r1")
    ledger.quarantine("d1", "bad", "r1")
    ledger.lift("d1", "good", "ann")
    assert ledger.unsettled() == ledger.rollouts(active=True) == []
    assert audit.verify(ledger.lines(), ledger.head()).breach is None
    with psycopg.connect(as_worker, autocommit=True) as connection:
        for statement in (*CHANGES, "DELETE FROM lockgate_settled", "UPDATE lockgate_claims SET rollout = 'x'"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
        for statement in ("DROP TRIGGER lockgate_no_change ON lockgate_entries", "DROP TABLE lockgate_entries"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_the_privileges_script_makes_the_tables_and_prints_what_psql_takes(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([url, "worker"]) == 0
    printed = capsys.readouterr().out
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(printed.encode())
        row = connection.execute("SELECT has_table_privilege('worker', 'lockgate_entries', 'INSERT')").fetchone()
        assert row == (True,)
    assert main([]) == 2


def test_commits_wait_for_the_disk_even_where_the_server_would_not(url: str, server: str, opened: Open) -> None:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {sa.make_url(url).database} SET synchronous_commit = off")
    with opened()._write() as session:
        assert session.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


def test_a_writer_that_stops_half_way_does_not_keep_the_others_out(
    url: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its session (here after 0.2 s), so the lock is free; the stopped writer has written nothing."""
    monkeypatch.setattr(ledger_connections, "_IDLE_S", 0.2)
    stopped, other = opened(), opened()
    stopped.head()
    with pytest.raises(PortError, match="cannot be used"), stopped._write():
        assert other.append("r1", 1, NOW, "other", "noted", {}).number == 1
    assert stopped.append("r2", 1, NOW, "stopped", "noted", {}).number == 2


def test_a_server_that_restarted_is_used_again(url: str, server: str, opened: Open) -> None:
    """Sessions that the server closed are noticed before they are used."""
    ledger = opened()
    ledger.append("r1", 1, NOW, "t", "noted", {})
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [sa.make_url(url).database]
        )
    assert ledger.append("r1", 2, NOW, "t", "noted", {}).number == 2


def test_folding_a_rollout_reads_its_own_entries_and_no_others(opened: Open) -> None:
    """Each query that a rollout or a delivery makes is answered by an index (where the table is not tiny)."""
    ledger = opened()
    ledger.head()
    asked: list[tuple[str, object]] = []
    sa.event.listen(
        ledger._engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, parameters, *_rest: asked.append((statement, parameters)),
    )
    ledger.read("r1")
    ledger.rollouts("m")
    ledger.quarantined("d1")
    ledger.head()
    ledger.append("r1", 1, NOW, "t", "noted", {})
    queries = [asked_for for asked_for in asked if asked_for[0].startswith("SELECT lockgate")]
    assert len(queries) >= 5
    with ledger._read() as connection:
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in queries:
            plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
            assert not any("Seq Scan" in step for step in plan), (statement, plan)


# ---------------------------------------------------------------- edits of what is stored


@pytest.fixture
def stored(url: str, opened: Open) -> Iterator[psycopg.Connection]:
    """A superuser in a ledger of five entries, whose triggers are disabled."""
    ledger = opened()
    for sequence in range(1, 6):
        ledger.append("r1", sequence, NOW + sequence, "t/1", "noted", {"n": sequence, "é": [None, 0.5]})
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE lockgate_entries DISABLE TRIGGER ALL")
        connection.commit()
        yield connection


def test_every_edit_of_every_stored_value_is_detected(stored: psycopg.Connection, opened: Open) -> None:
    head = opened().head()
    everything = f"SELECT {', '.join(COLUMNS)} FROM lockgate_entries ORDER BY number"
    tried = 0
    for place, column in itertools.product((1, 3), COLUMNS):
        row = stored.execute(f"SELECT {column} FROM lockgate_entries WHERE number = %s", [place]).fetchone()  # type: ignore[arg-type]
        assert row is not None
        for edited in edits_of(row[0]):
            try:
                stored.execute(f"UPDATE lockgate_entries SET {column} = %s WHERE number = %s", [edited, place])  # type: ignore[arg-type]
            except (psycopg.errors.UniqueViolation, psycopg.DataError):
                stored.rollback()  # the place of another entry, or nothing that PostgreSQL can store
                continue
            rows = stored.execute(everything).fetchall()  # type: ignore[arg-type]
            stored.rollback()
            tried += 1
            assert audit.verify((line_of(*each) for each in rows), head).breach is not None, (column, row, edited)
    assert tried > 3000
    assert audit.verify(opened().lines(), head).breach is None


def test_what_a_superuser_has_edited_deleted_swapped_or_cut_off_is_named(
    stored: psycopg.Connection, opened: Open
) -> None:
    """By what `lockgate audit verify` asks; the end that was cut off, by a head that was known before."""
    ledger = opened()
    known = ledger.head()

    def named(*statements: str) -> int | None:
        """The entry that does not fit after the changes, which are then taken back."""
        stored.execute("CREATE TEMP TABLE kept AS TABLE lockgate_entries")
        for statement in statements:
            stored.execute(statement.encode())
        stored.commit()
        found = audit.verify(ledger.lines(), ledger.head(), known=[known])
        stored.execute("DELETE FROM lockgate_entries")
        stored.execute("INSERT INTO lockgate_entries TABLE kept")
        stored.execute("DROP TABLE kept")
        stored.commit()
        assert audit.verify(ledger.lines(), ledger.head(), known=[known]).breach is None
        return found.breach.number if found.breach is not None else None

    table = "lockgate_entries"
    for place in range(1, 6):
        assert named(f"UPDATE {table} SET at = at + 1 WHERE number = {place}") == place
        assert named(f"DELETE FROM {table} WHERE number = {place}") == place
        assert named(f"DELETE FROM {table} WHERE number >= {place}") == place
    for one, other in itertools.combinations(range(1, 6), 2):
        swap = [
            f"UPDATE {table} SET number = {new} WHERE number = {old}"
            for old, new in ((one, -1), (other, one), (-1, other))
        ]
        assert named(*swap) == one
    assert named(f"TRUNCATE {table}") == 1
