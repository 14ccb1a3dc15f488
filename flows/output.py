"""A file that a command was asked to write."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.ports import BadInput


@contextlib.contextmanager
def output(path: Path) -> Iterator[BinaryIO]:
    """The file, whole once the block is done, and untouched if it fails. Raises BadInput where it cannot be written."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device: nothing is put in its place
            with path.open("wb") as sink:
                yield sink
            return
        file = path.resolve()
        aside = file.with_name(f".{file.name}.part")
        try:
            with aside.open("wb") as sink:
                yield sink
            aside.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise
        raise BadInput(f"{path} cannot be written: {exc.strerror or exc}") from exc
