"""One setting names a server; what cannot be made there is one sentence that says who has to run what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.databases_postgresql import NAMES, create, databases, missing, shown
from tasks.ports import BadInput, PortError
from tests.infra.postgresql_server import postgresql, programs_or_skip


def test_each_has_a_database_and_a_driver_of_its_own_and_no_password_is_shown() -> None:
    made = databases(Path("/h"), "postgresql://ann:secret@db:5433/?sslmode=require")
    assert made.prefect == "postgresql+asyncpg://ann:secret@db:5433/lockgate_prefect?ssl=require"
    assert made.mlflow == "postgresql+psycopg://ann:secret@db:5433/lockgate_mlflow?sslmode=require"
    assert made.ledger == "postgresql+psycopg://ann:secret@db:5433/lockgate?sslmode=require"
    assert "secret" not in shown(made.ledger)
    assert databases(Path("/h"), None).ledger == "sqlite:////h/ledger.db"


@pytest.mark.parametrize("url", ["mysql://a@b/", "postgresql://host/", "nonsense", "postgresql://u@h:abc/"])
def test_what_names_no_server_and_role_is_one_sentence(url: str) -> None:
    with pytest.raises(BadInput, match="write postgresql://"):
        databases(Path("/h"), url)


def test_a_server_that_is_not_there_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(PortError, match="cannot be used") as told:
        create(f"postgresql://ann:secret@/postgres?host={tmp_path}")
    assert "secret" not in str(told.value)


@pytest.mark.e2e
class TestServer:
    @pytest.fixture
    def server(self) -> Iterator[str]:
        with postgresql(programs_or_skip()) as url:
            yield url

    def test_they_are_made_by_who_may_and_else_it_is_said_what_to_run(self, server: str) -> None:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute("CREATE ROLE worker LOGIN")
            as_worker = server.replace("owner@", "worker@")
            for refused in (create, missing):
                with pytest.raises(BadInput, match='CREATE DATABASE "lockgate_prefect" OWNER "worker";') as told:
                    refused(as_worker)
            connection.execute("CREATE DATABASE unrelated")
            for statement in str(told.value).partition("run: ")[2].split("; "):
                connection.execute(statement)
        assert create(as_worker) == [], "what somebody else has made is used"
        assert missing(as_worker) == []
        with psycopg.connect(server, autocommit=True) as connection:
            for name in NAMES.values():
                connection.execute(f'DROP DATABASE "{name}"')
        assert missing(server) == list(NAMES.values())
        assert create(server) == list(NAMES.values())
        assert create(server) == []
