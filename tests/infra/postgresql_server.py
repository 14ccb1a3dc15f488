"""A PostgreSQL server of the tests' own: in a new folder, on a Unix socket, as a user that is not root."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.needs import lacking


def programs() -> Path | None:
    """The folder of the newest installed server, if one is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


def programs_or_skip() -> Path:
    """The same, or the test is skipped; in CI it fails, for there the server is installed."""
    found = programs()
    if found is None:
        lacking("PostgreSQL server", "postgresql")
    return found


def _as_user(folder: Path) -> dict[str, object]:
    """PostgreSQL refuses to run as root: then it runs as `postgres` or `nobody`, who gets the folder."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def immortal(bin_folder: Path) -> Iterator[str]:
    """As `postgresql`, with a server that is started again whenever it has ended."""
    over = threading.Event()

    def revive(start: Callable[[], bool]) -> None:
        while not over.wait(0.2):
            start()

    with _server(bin_folder, fsync=True) as (url, start):
        keeper = threading.Thread(target=revive, args=(start,))
        keeper.start()
        try:
            yield url
        finally:
            over.set()
            keeper.join()
            until = time.monotonic() + 60
            while not start():
                assert time.monotonic() < until, "PostgreSQL does not start again"
                time.sleep(0.2)


@contextlib.contextmanager
def postgresql(bin_folder: Path, fsync: bool = False) -> Iterator[str]:
    """The URL of a server's superuser in its database `postgres`; the server and its data are gone afterwards."""
    with _server(bin_folder, fsync) as (url, _start):
        yield url


@contextlib.contextmanager
def _server(bin_folder: Path, fsync: bool) -> Iterator[tuple[str, Callable[[], bool]]]:
    """The server's URL, and what starts it unless it runs, and says whether it does."""
    # Not in pytest's folder: only its owner may enter that, and a socket's path may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="lockgate-pg-"))
    user = _as_user(folder)
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder, "env": {"PATH": os.defpath}}
    initdb = [
        bin_folder / "initdb",
        "-D",
        data,
        "-U",
        "owner",
        "--auth=trust",
        "-E",
        "UTF8",
        "--no-locale",
        "--no-sync",
    ]
    control = [bin_folder / "pg_ctl", "-D", data, "-w", "-t", "60"]
    try:
        subprocess.run(initdb, check=True, **quiet, **user)  # type: ignore[call-overload]
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync={'on' if fsync else 'off'}"
        start = [*control, "-l", folder / "log", "-o", options, "start"]
        subprocess.run(start, check=True, **quiet, **user)  # type: ignore[call-overload]

        def started() -> bool:
            status = subprocess.run([*control, "status"], check=False, **quiet, **user)  # type: ignore[call-overload]
            if status.returncode == 0:
                return True
            # It refuses until the last process of the killed one has seen that, and ended: tried again.
            done = subprocess.run(start, check=False, **quiet, **user)  # type: ignore[call-overload]
            return bool(done.returncode == 0)

        try:
            yield f"postgresql://owner@/postgres?host={folder}", started
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, **quiet, **user)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(folder)
