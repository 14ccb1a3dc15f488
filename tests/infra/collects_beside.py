"""A loop that collects a failed query's cursor while another query waits for the loop's own transaction.

Says whether that query came through: `python -m tests.infra.collects_beside FILE`.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time

from infra.server_prefect import collect_beside

_BEGINS_S = 0.3  # the other query, for sure; if not, the test is told nothing
_WAITS_S = 4.0
_LOOP_S = 2.0


class Cycle:
    """What only a garbage collection ends."""

    def __init__(self, cursor: sqlite3.Cursor | None = None) -> None:
        self.me, self.cursor = self, cursor


def main(file: str) -> None:
    mine, shared = (
        sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=_WAITS_S) for _ in range(2)
    )
    Cycle(shared.execute("SELECT 1"))
    mine.execute("BEGIN IMMEDIATE")
    said: list[str] = []

    def query() -> None:
        try:
            shared.execute("BEGIN IMMEDIATE")
            said.append("came through")
        except sqlite3.OperationalError as exc:
            said.append(str(exc))

    waits = threading.Thread(target=query)
    waits.start()
    time.sleep(_BEGINS_S)
    until = time.monotonic() + _LOOP_S
    while time.monotonic() < until:  # what makes Python collect by itself
        Cycle()
    mine.execute("COMMIT")
    waits.join()
    print(*said)


if __name__ == "__main__":
    collect_beside()
    main(sys.argv[1])
