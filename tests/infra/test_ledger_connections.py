"""How the ledger's databases are connected to: no wait without a limit."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from psycopg.conninfo import make_conninfo

from infra.ledger_connections import engine


class Asked(Exception):
    """What psycopg is asked to connect with."""


def asked_for(url: str) -> dict[str, Any]:
    made = engine(url)

    def ask(_dialect: object, _record: object, _positional: object, named: dict[str, Any]) -> None:
        raise Asked(named)

    sa.event.listen(made, "do_connect", ask)
    with pytest.raises(Asked) as asked:
        made.connect()
    return {name: value for name, value in asked.value.args[0].items() if name != "context"}  # that is psycopg's own


def test_a_server_whose_host_is_gone_without_a_word_is_noticed_within_seconds() -> None:
    """Whoever waits for an answer has nothing to send, which is all that `tcp_user_timeout` looks at; the system's own
    keepalive begins after two hours."""
    options = asked_for("postgresql://u@ledger.example/d")
    assert make_conninfo(**options), "libpq knows every one of them"
    assert options["keepalives"] == 1
    assert options["keepalives_idle"] + options["keepalives_interval"] * options["keepalives_count"] <= 15
    assert options["tcp_user_timeout"] <= 15_000
