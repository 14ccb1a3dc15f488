"""The deployments: one list, the same in code and in the file, and forms that say what each field is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.deployments import ALL, POOL, Deployed, flow_of

FILE = Path(__file__).resolve().parents[2] / "infra" / "prefect.yaml"


def in_file(each: Deployed) -> dict[str, Any]:
    """The deployment as the file has to say it."""
    said: dict[str, Any] = {
        "name": each.name,
        "entrypoint": each.entrypoint,
        "description": each.description,
        "tags": [POOL],
        "work_pool": {"name": POOL, "work_queue_name": each.queue},
    }
    if each.interval_s is not None:
        said["schedules"] = [{"interval": each.interval_s}]
    if each.cron is not None:
        said["schedules"] = [{"cron": each.cron}]
    return said


def test_the_file_for_other_servers_says_what_the_code_says() -> None:
    assert yaml.safe_load(FILE.read_text())["deployments"] == [in_file(each) for each in ALL]


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_each_deployment_s_form_says_what_each_field_is_for(each: Deployed) -> None:
    flow = flow_of(each)
    assert flow.name == each.name
    for name, field in flow.parameters.properties.items():
        assert field.get("description"), f"{each.name}: {name}"
    for name, model in flow.parameters.definitions.items():
        for key, field in model["properties"].items():
            assert field.get("description"), f"{each.name}: {name}.{key}"
