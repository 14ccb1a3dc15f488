"""A PostgreSQL server of the tests' own: in a new folder, on a Unix socket, as a user that is not root."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def programs() -> Path | None:
    """The folder of the newest installed server, if one is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


def programs_or_skip() -> Path:
    """The same, or the test is skipped; in CI it fails, for there the server is installed."""
    found = programs()
    if found is None:
        away = pytest.fail if os.environ.get("CI") else pytest.skip
        away("no PostgreSQL server is installed (on Debian and Ubuntu: apt-get install postgresql)")
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
def postgresql(bin_folder: Path, fsync: bool = False) -> Iterator[str]:
    """The URL of a server's superuser in its database `postgres`; the server and its data are gone afterwards."""
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
        try:
            yield f"postgresql://owner@/postgres?host={folder}"
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, **quiet, **user)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(folder)
