"""The ledger's tables, and the triggers that refuse every change of an entry, for SQLite and PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
metadata = sa.MetaData()

entries = sa.Table(
    "lockgate_entries",
    metadata,
    sa.Column("number", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("rollout", sa.Text, nullable=False),
    sa.Column("sequence", _NUMBER, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),  # canonical JSON: the hash is of these very bytes
    sa.Column("previous_hash", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.UniqueConstraint("rollout", "sequence", name="lockgate_one_writer"),
)

# Who is the active rollout: a lock, not history, so it may be deleted.
claims = sa.Table(
    "lockgate_claims",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("rollout", sa.Text, nullable=False),
)

# Who waits to be the active rollout, in the order of coming.
queue = sa.Table(
    "lockgate_queue",
    metadata,
    sa.Column("rollout", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("place", _NUMBER, nullable=False),
)

# Rollouts that ask for nothing any more: known from their entries, kept so that nobody folds them again to find out.
settled = sa.Table("lockgate_settled", metadata, sa.Column("rollout", sa.Text, primary_key=True))

REFUSAL = "the ledger only grows: its entries are never changed or removed"

# What model a rollout is of stands in its first entry's body; the index reads it there, so there is no second truth.
MODEL_OF = {"sqlite": "json_extract(body, '$.model')", "postgresql": "((body)::json ->> 'model')"}
IS_REQUEST = "sequence = 1 AND kind = 'requested'"
IS_QUARANTINE = "kind IN ('quarantined', 'lifted')"


def _indexes(dialect: str) -> list[str]:
    wanted = {
        "lockgate_requests": ("number", IS_REQUEST),
        "lockgate_models": (f"{MODEL_OF[dialect]}, number", IS_REQUEST),
        "lockgate_quarantines": ("number", IS_QUARANTINE),
    }
    return [
        f"CREATE INDEX IF NOT EXISTS {name} ON {entries.name} ({columns}) WHERE {rows}"
        for name, (columns, rows) in wanted.items()
    ]


def _sqlite_triggers() -> list[str]:
    refusals = [
        f"CREATE TRIGGER IF NOT EXISTS lockgate_no_{what} BEFORE {what} ON {entries.name} "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
        for what in ("update", "delete")
    ]
    # INSERT OR REPLACE deletes without asking the delete trigger, so what is there already is refused before.
    same = "number = NEW.number OR (rollout = NEW.rollout AND sequence = NEW.sequence)"
    there = f"EXISTS (SELECT 1 FROM {entries.name} WHERE {same})"  # noqa: S608 - no foreign text in it
    replace = (
        f"CREATE TRIGGER IF NOT EXISTS lockgate_no_replace BEFORE INSERT ON {entries.name} WHEN {there} "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
    )
    return [*refusals, replace]


def _postgresql_triggers() -> list[str]:
    refuse = f"BEGIN RAISE EXCEPTION '{REFUSAL}'; END"
    then = "EXECUTE FUNCTION lockgate_refuse()"
    return [
        f"CREATE OR REPLACE FUNCTION lockgate_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ {refuse} $$",
        f"CREATE OR REPLACE TRIGGER lockgate_no_change BEFORE UPDATE OR DELETE ON {entries.name} FOR EACH ROW {then}",
        f"CREATE OR REPLACE TRIGGER lockgate_no_truncate BEFORE TRUNCATE ON {entries.name} FOR EACH STATEMENT {then}",
    ]


def create(connection: sa.Connection) -> None:
    """Tables, indexes and triggers are there. The caller holds the ledger's lock, so nobody else creates them too."""
    if sa.inspect(connection).has_table(queue.name):  # the last one made: all are there
        return
    metadata.create_all(connection, tables=[entries, claims])
    dialect = connection.dialect.name
    triggers = _sqlite_triggers() if dialect == "sqlite" else _postgresql_triggers()
    for statement in (*_indexes(dialect), *triggers):
        connection.exec_driver_sql(statement)
    metadata.create_all(connection, tables=[settled])
    metadata.create_all(connection, tables=[queue])
