"""A file that a command writes: whole, or as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flows.output import output
from tasks.ports import BadInput


def test_a_file_is_replaced_once_it_is_whole_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(TypeError), output(tmp_path / "link") as sink:
        sink.writelines([b"half", None])  # type: ignore[list-item]
    assert (tmp_path / "real").read_text() == "before"
    with output(tmp_path / "link") as sink:
        sink.write(b"after")
    assert (tmp_path / "real").read_text() == "after"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "real"]


def test_a_pipe_is_written_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with output(pipe) as sink:
        sink.write(b"said")
    assert os.read(reader, 100) == b"said"
    os.close(reader)
    assert pipe.is_fifo()


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/"), tmp_path / "nowhere" / "x"):
        with pytest.raises(BadInput, match="cannot be written"), output(path):
            pass


def test_a_full_disk_is_not_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as found, output(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert found.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
