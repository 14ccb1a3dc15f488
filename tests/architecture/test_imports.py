"""What must not be loaded: the data plane and the command line start without the heavy vendors."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("prefect", "mlflow", "evidently", "great_expectations", "pandas", "sklearn", "sqlalchemy", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that are loaded in a fresh interpreter after the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["serving.server", "serving.agent", "serving.gateway", "serving.zygote"])
def test_the_data_plane_boots_without_the_control_plane(module: str) -> None:
    assert not loaded_by(f"import {module}") & {*HEAVY, "flows", "tasks", "infra", "pydantic", "yaml"}


@pytest.mark.parametrize("module", ["flows.cli", "flows.run", "flows.overview", "flows.demo"])
def test_a_command_knows_where_its_servers_are_before_prefect_is_imported(module: str) -> None:
    """Prefect reads its settings when it is imported: too early, and each command starts a server of its own."""
    assert not loaded_by(f"import {module}") & {"prefect", "mlflow", "evidently", "great_expectations", "sklearn"}


def test_decisions_load_no_vendor() -> None:
    assert not loaded_by("import policies.rollout, policies.gates, policies.plan") & {*HEAVY, "httpx", "aiohttp"}
