"""What the registry asks for, and when a flow run is started for it (again)."""

from __future__ import annotations

import pytest

from policies.policy import Trigger
from policies.triggers import OUTCOME_TAG, Run, attempt, wanted

DONE = {OUTCOME_TAG: "promoted"}
OWN = {"lockgate.source": "/tmp/model.onnx"}
ADOPTED = {"lockgate.source": "models:/m/3"}


@pytest.mark.parametrize(
    ("trigger", "aliases", "versions", "asked"),
    [
        (Trigger(), {"candidate": "2", "champion": "1"}, {"1": DONE, "2": {}}, ["2"]),
        (Trigger(), {"candidate": "1"}, {"1": DONE}, ["1"]),  # set anew, it asks anew
        (Trigger(), {"champion": "1"}, {"1": {}, "2": {}}, []),
        (Trigger(), {"candidate": "9"}, {"1": {}}, []),
        (Trigger(name="staging"), {"candidate": "1", "staging": "2"}, {"1": {}, "2": {}}, ["2"]),
        (Trigger(kind="nothing"), {"candidate": "1"}, {"1": {}}, []),
        (Trigger(kind="tag", name="go"), {}, {"1": {"go": "yes"}, "2": {}, "3": {"go": "False"}}, ["1"]),
        (
            Trigger(kind="tag", name="go"),
            {},
            {"1": {"go": "yes"} | DONE, "10": {"go": ""}, "9": {"go": "1"}},
            ["9", "10"],
        ),
        (Trigger(kind="version"), {}, {}, []),
        (Trigger(kind="version"), {}, {"1": {}, "2": {}, "10": {}}, ["10"]),  # nobody wants the whole past delivered
        (Trigger(kind="version"), {}, {"1": {}, "2": DONE, "3": ADOPTED, "10": {}, "9": DONE}, ["3", "10"]),
        (Trigger(kind="version"), {}, {"1": DONE, "2": OWN}, []),
    ],
)
def test_what_is_asked_for(
    trigger: Trigger, aliases: dict[str, str], versions: dict[str, dict[str, str]], asked: list[str]
) -> None:
    assert wanted(trigger, aliases, versions) == asked


@pytest.mark.parametrize(
    ("ends", "number"),
    [
        ([], 1),
        ([None], None),
        ([900.0, None], None),
        ([998.0], None),  # 2 s ago: the second waits 5 s
        ([995.0], 2),
        ([900.0, 991.0], None),  # the third waits 10 s
        ([900.0, 990.0], 3),
        ([900.0 - i for i in range(20)], None),  # never more often than every ten minutes ...
        ([400.0 - i for i in range(20)], 21),  # ... and never less often
        ([-2601.0, -2600.5, 994.0], 4),  # what was more than an hour ago is forgiven
    ],
)
def test_the_next_run_waits_longer_the_more_there_were(ends: list[float | None], number: int | None) -> None:
    assert attempt([Run(end) for end in ends], 1000.0) == number
