"""Prefect's server for SQLite, whose garbage is collected beside it: `python -m infra.server_prefect server start ...`.

Its event loop would wait for itself otherwise. A query that failed leaves its cursor in a cycle of references. Whoever
collects that resets the cursor and waits for the connection, if another query uses it. That one may wait, for up to a
minute, until somebody else's transaction is over, and those go on in the event loop, which was collecting.
"""

from __future__ import annotations

import gc
import threading
import time
from typing import NoReturn

_EVERY_S = 1.0
_WHOLLY_EVERY = 60  # times: what has lived for long is a lot to look at, and seldom garbage


def collect_beside() -> None:
    """From now on garbage is collected in a thread of its own alone."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> NoReturn:
    while True:
        for _ in range(_WHOLLY_EVERY):
            time.sleep(_EVERY_S)
            gc.collect(1)
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()  # what the server is made of: the loop stands still while it is looked at, once is enough


def main() -> None:
    """The life of the process, with Prefect's own arguments."""
    from prefect.cli import app

    collect_beside()
    app()


if __name__ == "__main__":
    main()
