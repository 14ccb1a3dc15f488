"""A policy that says which model it is for is used for no other."""

from __future__ import annotations

import pytest

from flows.policy import for_model
from flows.rehearse import rehearse
from policies.policy import parse
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
