"""A policy that says which model it is for is used for no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.policy import for_model, shelf_in
from flows.rehearse import rehearse
from policies.policy_yaml import parse
from tasks.ports import BadInput

POLICY = "policy: p\nmodel: theirs\nrollout: {stages: [canary: {weight: 10, for: 5s}]}\n"


def test_it_is_for_its_own_model_or_for_any() -> None:
    own = parse(POLICY)
    assert for_model(own, "theirs") is own
    assert for_model(parse(POLICY.replace("model: theirs\n", "")), "mine").model is None
    with pytest.raises(BadInput, match="is for model 'theirs', not 'mine'"):
        for_model(own, "mine")


def test_a_rehearsal_by_another_model_s_policy_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(BadInput, match="is for model 'theirs', not 'mine'"):
        rehearse.fn("mine", policy=POLICY)


def test_a_file_that_yaml_trips_over_costs_the_other_policies_nothing(tmp_path: Path) -> None:
    (tmp_path / "sound.yaml").write_text(POLICY)
    (tmp_path / "typo.yaml").write_text(POLICY + "governance: {freeze: [{from: 2026-02-30, to: 2026-03-01}]}\n")
    shelf = shelf_in(tmp_path)
    assert shelf.policy_for("theirs") is not None
    assert "2026-02-30" in shelf.unsound["typo.yaml"]
