"""What must not be loaded: the data plane and the command line start without the heavy vendors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_onnx_runtime_is_loaded_in_one_place_which_has_silenced_it_before() -> None:
    root = Path(__file__).resolve().parents[2]
    folders = ("flows", "infra", "policies", "serving", "tasks")
    files = [path for folder in folders for path in root.glob(f"{folder}/*.py")]
    imported = re.compile(r"^\s*(import|from) onnxruntime", re.MULTILINE)
    assert [path.name for path in files if imported.search(path.read_text())] == ["runtime.py"]
    code = "import os, serving.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, timeout=60)
    assert done.stdout == "1\n"


def test_decisions_load_no_vendor() -> None:
    assert not loaded_by("import policies.rollout, policies.gates, policies.plan") & {*HEAVY, "httpx", "aiohttp"}
