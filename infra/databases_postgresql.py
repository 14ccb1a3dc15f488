"""Where the platform's three databases are: SQLite files in its folder, or databases of one PostgreSQL server.

Each on its own: Prefect and MLflow both keep their migrations in a table `alembic_version`. They are made here where
the role may; where not, whoever may is told what to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.ports import BadInput, PortError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection
    from sqlalchemy.exc import DBAPIError

NAMES = {"prefect": "lockgate_prefect", "mlflow": "lockgate_mlflow", "ledger": "lockgate"}
_EXTENSION = "pg_trgm"  # Prefect's migrations create it
_CONNECT_S = 10


@dataclass(frozen=True)
class Databases:
    """The URL of each, with its driver, and with its password if it has one."""

    prefect: str
    mlflow: str
    ledger: str


def databases(home: Path, server: str | None) -> Databases:
    """Those of the platform in the folder: on the server if there is one, else files. Raises BadInput."""
    if not server:
        return Databases(
            f"sqlite+aiosqlite:///{home / 'prefect.db'}",
            f"sqlite:///{home / 'mlflow.db'}",
            f"sqlite:///{home / 'ledger.db'}",
        )
    url = _server(server)
    # asyncpg takes libpq's parameters but for this name.
    asyncpg = url.difference_update_query(["sslmode"])
    if "sslmode" in url.query:
        asyncpg = asyncpg.update_query_dict({"ssl": str(url.query["sslmode"])})
    return Databases(
        _text(asyncpg.set(drivername="postgresql+asyncpg", database=NAMES["prefect"])),
        _text(url.set(drivername="postgresql+psycopg", database=NAMES["mlflow"])),
        _text(url.set(drivername="postgresql+psycopg", database=NAMES["ledger"])),
    )


def create(server: str) -> list[str]:
    """The databases are there; the names of those that were made now. Raises BadInput, PortError."""
    import sqlalchemy as sa

    url = _server(server)
    with _connected(url) as connection:
        absent = _absent(connection)
        try:
            for name in absent:
                connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
        except sa.exc.ProgrammingError as exc:
            raise BadInput(_have_made(url, absent)) from exc
    _extend(url)
    return absent


def missing(server: str) -> list[str]:
    """The databases that are not there yet. Raises BadInput where this role could not make them, and PortError."""
    import sqlalchemy as sa

    url = _server(server)
    with _connected(url) as connection:
        absent = _absent(connection)
        may = sa.text("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user")
        if absent and not connection.execute(may).scalar():
            raise BadInput(_have_made(url, absent))
    return absent


@contextmanager
def _connected(url: URL) -> Iterator[Connection]:
    """To the database that the URL names, or `postgres`."""
    import sqlalchemy as sa

    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg", database=url.database or "postgres"),
        isolation_level="AUTOCOMMIT",
        connect_args={"connect_timeout": _CONNECT_S},
    )
    try:
        with engine.connect() as connection:
            yield connection
    except sa.exc.OperationalError as exc:
        where = url.render_as_string(hide_password=True)
        raise PortError(f"the PostgreSQL server {where} cannot be used: {_first_line(exc)}") from exc
    finally:
        engine.dispose()


def _absent(connection: Connection) -> list[str]:
    there = set(connection.exec_driver_sql("SELECT datname FROM pg_database").scalars())
    return [name for name in NAMES.values() if name not in there]


def _have_made(url: URL, absent: list[str]) -> str:
    todo = " ".join(f'CREATE DATABASE "{name}" OWNER "{url.username}";' for name in absent)
    where = url.render_as_string(hide_password=True)
    return f"this role may create no databases on {where}; have somebody run: {todo}"


def _extend(url: URL) -> None:
    """Prefect's extension is there, or one sentence says who has to bring it: its own traceback has fifty lines."""
    import sqlalchemy as sa

    name = NAMES["prefect"]
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg", database=name), connect_args={"connect_timeout": _CONNECT_S}
    )
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE EXTENSION IF NOT EXISTS {_EXTENSION}")
    except sa.exc.DBAPIError as exc:
        raise BadInput(
            f"Prefect needs the extension {_EXTENSION} in the database {name}, and this role may not add it"
            f" ({_first_line(exc)}); have somebody run there: CREATE EXTENSION {_EXTENSION};"
        ) from exc
    finally:
        engine.dispose()


def shown(url: str) -> str:
    """The URL as it may be shown and written down: without its password."""
    if "@" not in url:
        return url
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)


def _server(text: str) -> URL:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as exc:  # a port that is no number is a ValueError
        raise BadInput("the database cannot be read as a URL; write postgresql://user@host:5432/") from exc
    if url.get_backend_name() not in ("postgresql", "postgres") or not url.username:
        raise BadInput(f"'{shown(text)}' names no PostgreSQL server and role; write postgresql://user@host:5432/")
    return url


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).splitlines()[0]
