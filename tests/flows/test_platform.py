"""A platform's folder is one platform's: nobody else starts there, empties it, or begins its log anew."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from flows import platform
from flows.settings import Settings
from flows.wiring import clear_demo
from infra.platform_local import lock
from tasks.ports import BadInput, PortError


def test_a_second_platform_in_the_background_says_why_not_and_leaves_the_first_s_log(tmp_path: Path) -> None:
    (tmp_path / "up.log").write_text("Agent was started again\n")
    said = io.StringIO()
    held = lock(tmp_path)
    code = platform.up(Settings(home=tmp_path), True, Console(file=io.StringIO()), Console(file=said, soft_wrap=True))
    os.close(held)
    assert code == 3
    assert said.getvalue().startswith(f"lockgate: a platform runs in {tmp_path} already")
    assert said.getvalue().count("\n") == 1
    assert (tmp_path / "up.log").read_text() == "Agent was started again\n" + said.getvalue()


def test_a_demo_s_folder_is_not_emptied_under_a_demo_that_is_starting(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    clear_demo(home)
    (home / "models").mkdir()
    held = lock(home)
    with pytest.raises(PortError, match="already"):
        clear_demo(home)
    assert (home / "models").exists()
    os.close(held)
    clear_demo(home)
    assert not (home / "models").exists()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(BadInput, match="not empty"):
        clear_demo(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]
