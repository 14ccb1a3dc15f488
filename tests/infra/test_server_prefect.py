"""Prefect's server on SQLite does not wait for itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_loop_goes_on_while_garbage_waits_for_the_database(tmp_path: Path) -> None:
    """Else nobody ends the transaction that the other query waits for: the server had answered nobody for a minute."""
    command = [sys.executable, "-m", "tests.infra.collects_beside", str(tmp_path / "prefect.db")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == "came through\n"
