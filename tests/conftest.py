"""What the whole suite shares: the simulation's base seed, told before anything runs, and Hypothesis' patience."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import HealthCheck, settings

_SEED = "LOCKGATE_SIMULATE_SEED"


def pytest_configure(config: pytest.Config) -> None:
    """A fresh seed for each run of the suite. It stands in the environment, so that every worker has the same."""
    os.environ.setdefault(_SEED, str(time.time_ns() % 10**12))
    # How fast examples are drawn says how busy the machine is, and nothing about the code.
    settings.register_profile("lockgate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("lockgate")


def pytest_report_header(config: pytest.Config) -> str:
    return f"simulation: base seed {os.environ[_SEED]} (again: {_SEED}={os.environ[_SEED]})"
