"""Who may do what with a ledger on PostgreSQL: `python -m infra.ledger_privileges URL ROLE | psql URL`.

The owner of the tables makes them once; everybody else, lockgate's own processes included, works as a role that may
read and add entries, and nothing else. (The triggers refuse changes to the owner, too, until he drops them on
purpose; what he then changes, `lockgate audit verify` finds.)
"""

from __future__ import annotations

import sys

from infra import ledger_schema as schema


def grants(role: str) -> list[str]:
    """The statements, to be run by the tables' owner once a ledger was opened as that owner."""
    name = '"' + role.replace('"', '""') + '"'
    tables = ", ".join(table.name for table in (schema.entries, schema.claims, schema.queue, schema.settled))
    return [
        f"REVOKE ALL ON {tables} FROM PUBLIC, {name}",
        f"GRANT SELECT, INSERT ON {tables} TO {name}",
        # A claim is a lock: it is given back. Entries and what is settled are for ever.
        f"GRANT DELETE ON {schema.claims.name}, {schema.queue.name} TO {name}",
    ]


def main(arguments: list[str]) -> int:
    """Makes the tables as the URL's user, and prints the grants for the role."""
    if len(arguments) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    from infra.ledger_sql import SqlLedger

    url, role = arguments
    ledger = SqlLedger(url)
    ledger.head()
    ledger.close()
    sys.stdout.write("".join(f"{statement};\n" for statement in grants(role)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
