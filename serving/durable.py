"""What the node agent keeps on disk: its state, the models' bytes, and what it did by itself.

Every file is written aside, synced and renamed, so that a crash leaves the old content or the new, never half of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from serving.agent_errors import BadRequest, NotDurable

_NUMBERS = count(1)  # of files written aside: several may wait for a slow disk, or be copied at once
EVENTS_KEPT = 1000
UNUSED_MODELS_KEPT = 10


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """`path` holds `data`, also after a power failure. Raises NotDurable (disk full, read-only, ...)."""
    put_in_place(write_aside(path, data, mode), path)


def write_aside(path: Path, data: bytes, mode: int = 0o600) -> Path:
    """Quick: the data is in a file beside `path`, for `put_in_place`. Raises NotDurable where there is no room."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{next(_NUMBERS)}")
    with _durable(path, aside):
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - from a descriptor, to set the mode at creation
            file.write(data)
    return aside


def put_in_place(aside: Path, path: Path) -> None:
    """As slow as the disk: what is in `aside` is on it, and then under the name `path`. Raises NotDurable."""
    with _durable(path, aside):
        descriptor = os.open(aside, os.O_WRONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.replace(path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _durable(path: Path, aside: Path) -> Iterator[None]:
    """What the system refuses becomes NotDurable, and leaves nothing aside."""
    try:
        yield
    except OSError as exc:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise NotDurable(f"could not write {path}: {exc.strerror or exc}") from exc


def write_whole(path: Path, data: bytes) -> None:
    """Readers of `path` find the old content or `data`, never half of it; not synced, so quick. Raises NotDurable."""
    aside = write_aside(path, data)
    with _durable(path, aside):
        aside.replace(path)


@dataclass(frozen=True)
class Aside:
    """Content that waits beside its file to be put in place; `number` counts them in the order of their making."""

    path: Path
    number: int


class StateFile:
    """A file that is replaced whenever something changes, by several at once. The newest content wins, however long the
    disk takes for an older one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = 0
        self._on_disk = 0
        self._disk = asyncio.Lock()

    def aside(self, data: bytes) -> Aside:
        """Quick: the content, for `put`. Raises NotDurable where there is no room."""
        written = write_aside(self.path, data)
        self._made += 1
        return Aside(written, self._made)

    async def put(self, aside: Aside) -> None:
        """As slow as the disk: this content, or a newer one, is on it when this returns. Raises NotDurable."""
        async with self._disk:
            if aside.number < self._on_disk:
                aside.path.unlink(missing_ok=True)
                return
            await asyncio.to_thread(put_in_place, aside.path, self.path)
            self._on_disk = aside.number


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The file's content; None if there is no such file. Raises BadRequest if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as exc:
        raise BadRequest(
            f"{path} is not JSON ({exc}); restore it, or remove it to start with nothing deployed"
        ) from exc


class ModelStore:
    """The bytes of all deployed versions, by digest, so that going back needs neither registry nor network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):  # by an agent that was killed while it copied
            left.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Where bytes of this digest are, or would be."""
        return self._folder / f"{digest}.onnx"

    def add(self, source: Path, digest: str) -> Path:
        """The stored copy, its digest checked. Blocks; raises BadRequest for a missing file or other bytes, NotDurable.

        Bytes that are already here need no source. The same bytes may be added by several at once.
        """
        kept = self.path(digest)
        if kept.exists() and _sha256(kept) == digest:
            with contextlib.suppress(OSError):
                kept.touch()  # of those that no version has, the newest are kept: these are about to be used
            return kept
        aside = kept.with_suffix(f".{next(_NUMBERS)}.part")
        try:
            shutil.copyfile(source, aside)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            found = _sha256(aside)
            if found != digest:
                raise BadRequest(
                    f"{source} has the digest {found}, not {digest}: these are not the bytes that were tested"
                )
            aside.replace(kept)
            _sync_folder(self._folder)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as exc:
            raise BadRequest(f"cannot read the model file {source}: {exc.strerror}") from exc
        except OSError as exc:
            raise NotDurable(f"could not store {source}: {exc.strerror or exc}") from exc
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        return kept

    def prune(self, used: Iterable[str]) -> None:
        """Drops bytes that no deployed version has, but for the newest few."""
        drop_oldest(self._folder.glob("*.onnx"), {self.path(digest) for digest in used}, UNUSED_MODELS_KEPT)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop_oldest(paths: Iterable[Path], used: Container[Path], kept: int) -> None:
    """Drops the files or folders that are not in use, but for the newest `kept`. What cannot be dropped stays."""
    with contextlib.suppress(OSError):
        unused = sorted((path for path in paths if path not in used), key=lambda path: path.stat().st_mtime)
        for path in unused[: max(0, len(unused) - kept)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class EventLog:
    """What the agent did by itself, numbered: the newest `EVENTS_KEPT`, over restarts too if the disk allows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._lines = 0
        self._cut_off = False  # the file may end within a line: after a crash, or on a full disk
        if path.exists():
            text = path.read_text(errors="replace")
            self._cut_off = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                with contextlib.suppress(ValueError):  # a line that was cut off
                    self._events.append(json.loads(line))
                self._lines += 1

    def add(self, kind: str, says: str, **facts: Any) -> dict[str, Any]:
        """The event, kept in memory at once and on disk if that is possible: an unwritable log stops nothing."""
        number = self._events[-1]["n"] + 1 if self._events else 1
        event = {"n": number, "at": time.time(), "kind": kind, "says": says, **facts}
        self._events.append(event)
        with contextlib.suppress(OSError, NotDurable):
            self._write(event)
        return event

    def _write(self, event: dict[str, Any]) -> None:
        if self._lines >= 2 * EVENTS_KEPT:
            write_durably(self._path, b"".join(_line(kept) for kept in self._events))
            self._lines, self._cut_off = len(self._events), False
            return
        line = b"\n" + _line(event) if self._cut_off else _line(event)
        with self._path.open("ab") as file:
            self._cut_off = True
            file.write(line)
        self._cut_off = False
        self._lines += 1

    def after(self, number: int) -> list[dict[str, Any]]:
        """The events after that number, oldest first."""
        return [event for event in self._events if event["n"] > number]


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"
