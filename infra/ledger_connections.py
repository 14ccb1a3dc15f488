"""How the ledger's databases are connected to: durable, with limits on every wait, one writer at a time."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection

from tasks.ports import BadInput

_WAIT_S = 10.0
_SWITCH_S = 0.01
_STATEMENT_S = 60.0
_IDLE_S = 10.0  # longer than an append ever thinks between two statements
_LOCK = 0x10C4_6A7E  # of the ledger, among PostgreSQL's advisory locks


def engine(url: str) -> sa.Engine:
    """Connections whose transactions have the option `writes` hold the ledger's lock from their beginning.

    Raises BadInput for a URL that cannot be read, or of a database that cannot keep a ledger.
    """
    try:
        made = make_url(url)
    except (sa.exc.ArgumentError, ValueError) as exc:  # the latter: a port that is no number
        raise BadInput("the ledger's URL cannot be read; write sqlite:///path or postgresql://user@host/name") from exc
    if made.get_backend_name() == "sqlite":
        return _sqlite(made)
    if made.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _postgresql(made.set(drivername="postgresql+psycopg"))
    raise BadInput(f"the ledger cannot be kept in '{made.drivername}'; use sqlite or postgresql")


def _sqlite(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise BadInput("a ledger in memory is lost with its process; name a file: sqlite:///path/ledger.db")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    made = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": _WAIT_S})
    sa.event.listen(made, "connect", _prepare_sqlite)
    sa.event.listen(made, "begin", _begin_sqlite)
    return made


def _prepare_sqlite(connection: DBAPIConnection, _record: Any) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says so, not where pysqlite guesses
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA cell_size_check=ON")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switches the file to a write-ahead log, once in its life. SQLite's own time-out does not cover the switch."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(_SWITCH_S)  # somebody else is switching it


def _begin_sqlite(connection: sa.Connection) -> None:
    # IMMEDIATE takes the one write lock before anything is read, so that what was read still holds when writing.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: sa.URL) -> sa.Engine:
    made = sa.create_engine(
        url,
        hide_parameters=True,  # evidence has no business in a log
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": int(_WAIT_S),
            "application_name": "lockgate",
            "tcp_user_timeout": int(1000 * _WAIT_S),
            # Whoever waits for an answer has sent all: a host that died without a word is noticed by asking it.
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
        },
    )
    sa.event.listen(made, "connect", _prepare_postgresql)
    sa.event.listen(made, "begin", _begin_postgresql)
    return made


def _prepare_postgresql(connection: DBAPIConnection, _record: Any) -> None:
    cursor = connection.cursor()
    settings = (
        f"SET lock_timeout = {int(1000 * _WAIT_S)}",
        f"SET statement_timeout = {int(1000 * _STATEMENT_S)}",
        # A controller that is stopped in the middle of an append must not keep all others from writing.
        f"SET idle_in_transaction_session_timeout = {int(1000 * _IDLE_S)}",
        "SET default_transaction_isolation = 'read committed'",
    )
    for setting in settings:
        cursor.execute(setting)
    cursor.execute("SHOW synchronous_commit")
    shown = cursor.fetchone()
    if shown is not None and shown[0] == "off":
        cursor.execute("SET synchronous_commit = on")
    cursor.close()
    connection.commit()


def _begin_postgresql(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
