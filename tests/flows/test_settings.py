"""Settings: what cannot be used is told in a sentence, and who asks has a name wherever it runs."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.settings import Settings, read_settings
from tasks.ports import BadInput


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs under a number that no user has, and tells no name."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)


def test_who_has_no_name_is_known_by_the_number(nameless: None) -> None:
    assert Settings().person == f"uid {os.getuid()}"
    assert Settings(user="ann").person == "ann"


def test_who_has_no_home_is_told_to_name_a_folder(nameless: None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="LOCKGATE_HOME"):
        _ = Settings().folder
    assert Settings(home=tmp_path).folder == tmp_path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The settings' file in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "lockgate.toml"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"user = 'ann'\nhome = [oops\n", "Invalid value .at line 2, column 9."),
        (b"# \xff\n", "'utf-8' codec can't decode byte 0xff"),
        (b"hoem = '/srv'\n", "hoem: Extra inputs"),
        (b"prefect_port = 99999\n", "prefect_port: .*65535"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_place(here: Path, text: bytes, says: str) -> None:
    here.write_bytes(text)
    with pytest.raises(BadInput, match=rf"lockgate\.toml.*{says}"):
        read_settings()
