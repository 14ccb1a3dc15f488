"""Programs of the system that some tests need."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(what: str, package: str) -> NoReturn:
    """Skips the test, and says why; in CI, where everything is installed, it fails."""
    away = pytest.fail if os.environ.get("CI") else pytest.skip
    away(f"no {what} is installed (on Debian and Ubuntu: apt-get install {package})")
