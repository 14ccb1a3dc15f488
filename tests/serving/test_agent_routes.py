"""Epochs and leases: what the agent takes on, refuses, and ends by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.traffic import Key, Route, Rule
from serving.agent_errors import BadRequest, Conflict, NotReady
from serving.routes import (
    Capacity,
    Held,
    back_on_stable,
    changed,
    leased,
    ran_out,
    renewed,
    route_from,
    without_more,
)

READY = {"1": Capacity(1, 1), "2": Capacity(4, 4)}
CANARY = Route("m", "1", "2", weight=5, epoch=3, lease_s=10.0)


def test_an_older_epoch_is_refused_and_the_current_one_named() -> None:
    held = changed(None, CANARY, READY, now=0.0)
    with pytest.raises(Conflict, match="epoch 2 for m is older than the epoch 3") as refused:
        changed(held, replace(CANARY, epoch=2, weight=50), READY, now=1.0)
    assert refused.value.facts == {"epoch": 3}


def test_the_same_epoch_again_is_idempotent_but_may_not_say_anything_else() -> None:
    held = changed(None, CANARY, READY, now=0.0)
    assert changed(held, CANARY, READY, now=4.0) == Held(CANARY, renewed=4.0)
    with pytest.raises(Conflict, match="already stands for another route"):
        changed(held, replace(CANARY, weight=50), READY, now=1.0)


def test_a_lost_lease_spends_its_epoch_and_a_newer_one_starts_afresh() -> None:
    held = back_on_stable(changed(None, CANARY, READY, now=0.0), at=1000.0)
    assert (held.route.candidate, held.route.weight, held.route.shadow, held.route.stable) == (None, 0, 0, "1")
    assert held.lost is not None
    assert (held.lost.epoch, held.lost.at) == (3, 1000.0)
    with pytest.raises(Conflict, match="was lost; take a new epoch"):
        changed(held, CANARY, READY, now=1.0)
    with pytest.raises(Conflict, match="lost"):
        renewed(held, "m", 3, now=1.0)
    assert changed(held, replace(CANARY, epoch=4), READY, now=1.0).lost is None


def test_who_would_go_on_with_a_share_that_was_lost_is_refused_and_who_begins_one_is_not() -> None:
    held = back_on_stable(changed(None, CANARY, READY, now=0.0), at=1000.0)
    with pytest.raises(Conflict, match="the lease of epoch 3 was lost, and with it the share that epoch 4"):
        changed(held, replace(CANARY, epoch=4, weight=50, continues=True), READY, now=1.0)
    begun = changed(held, replace(CANARY, epoch=5), READY, now=1.0)
    assert changed(begun, replace(CANARY, epoch=6, weight=20, continues=True), READY, now=2.0).route.weight == 20


def test_a_renewal_after_the_lease_ran_out_is_refused_even_before_the_agent_noticed() -> None:
    held = changed(None, CANARY, READY, now=0.0)
    assert renewed(held, "m", 3, now=9.9).lease_left_s(now=9.9) == 10.0
    with pytest.raises(Conflict, match="lost"):
        renewed(held, "m", 3, now=10.0)


def test_only_the_epoch_in_force_can_renew() -> None:
    held = changed(None, CANARY, READY, now=0.0)
    for epoch in (2, 4):
        with pytest.raises(Conflict, match="is not in force"):
            renewed(held, "m", epoch, now=1.0)
    with pytest.raises(Conflict, match="has no route"):
        renewed(None, "m", 1, now=1.0)


@given(
    lease=st.floats(0.1, 3600),
    gaps=st.lists(st.floats(0, 5000), max_size=20),
)
def test_the_share_lasts_exactly_as_long_as_each_renewal_comes_in_time(lease: float, gaps: list[float]) -> None:
    held = changed(None, replace(CANARY, lease_s=lease), READY, now=0.0)
    now, alive = 0.0, True
    for gap in gaps:
        since, now = now, now + gap
        alive = alive and now - since < lease
        assert ran_out(held, now) is not alive
        if not alive:
            with pytest.raises(Conflict):
                renewed(held, "m", 3, now)
            return
        held = renewed(held, "m", 3, now)


@pytest.mark.parametrize(
    ("route", "has_lease"),
    [
        (CANARY, True),
        (replace(CANARY, weight=0, shadow=50), True),
        (replace(CANARY, weight=0), False),
        (replace(CANARY, lease_s=None), False),
        (Route("m", None, "2", weight=100, lease_s=5.0), False),  # nothing to go back to
        (Route("m", "1", lease_s=5.0), False),
    ],
)
def test_a_lease_is_on_a_share_that_can_be_taken_back(route: Route, has_lease: bool) -> None:
    assert leased(route) is has_lease
    held = changed(None, route, READY, now=0.0)
    assert ran_out(held, now=1e9) is has_lease


@pytest.mark.parametrize(
    ("route", "capacity", "refused"),
    [
        (CANARY, {"1": Capacity(1, 1), "2": Capacity(1, 0)}, "version 2 of m has no ready replica"),
        (CANARY, {"1": Capacity(1, 0), "2": Capacity(1, 1)}, "version 1 of m has no ready replica"),
        (CANARY, {"1": Capacity(1, 1)}, "version 2 of m has no ready replica"),
        (replace(CANARY, weight=30), {"1": Capacity(1, 1), "2": Capacity(4, 1)}, "too few for a weight of 30"),
        (Route("m", "2", epoch=1), {"2": Capacity(4, 0)}, "version 2 of m has no ready replica"),
    ],
)
def test_weight_never_exceeds_ready_capacity(route: Route, capacity: dict[str, Capacity], refused: str) -> None:
    with pytest.raises(NotReady, match=refused):
        changed(None, route, capacity, now=0.0)


def test_going_back_needs_one_ready_stable_replica_and_nothing_of_the_candidate() -> None:
    held = changed(None, CANARY, READY, now=0.0)
    back = Route("m", "1", epoch=4)
    assert changed(held, back, {"1": Capacity(8, 1)}, now=1.0).route == back
    assert without_more(held.route, back)
    assert without_more(held.route, replace(CANARY, weight=1))
    assert not without_more(held.route, replace(CANARY, weight=6))
    assert not without_more(held.route, replace(CANARY, candidate="3"))
    assert not without_more(None, CANARY)
    assert not without_more(held.route, replace(CANARY, rules=(Rule(Key(), ("ann",), "candidate"),)))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"stable": "1", "wieght": 5}, "unknown field 'wieght'"),
        ({"stable": "1", "model": "other"}, "the route is for 'other', the path for 'm'"),
        ({"stable": "1", "candidate": "2", "weight": 5.5}, "'weight' must be a whole number, not 5.5"),
        ({"stable": "1", "candidate": "2", "weight": True}, "'weight' must be a whole number, not True"),
        ({"stable": 1}, "'stable' must be a version or null, not 1"),
        ({"stable": "1", "lease_s": -1}, "'lease_s' must be seconds"),
        ({"stable": "1", "lease_s": float("nan")}, "'lease_s' must be seconds"),
        ({"stable": "1", "timeout_s": "1"}, "'timeout_s' must be seconds or null, not '1'"),
        ({"stable": "1", "timeout_s": 0}, "a time-out of 0 s is not between"),
        ({"stable": "1", "timeout_s": float("nan")}, "a time-out of nan s is not between"),
        ({"stable": "1", "candidate": "2", "weight": 101}, "weight 101 is not between 0 and 100"),
        ({"stable": "1", "key": {"kind": "ip"}}, "'ip' is no kind of key"),
        ({"stable": "1", "key": {"kind": "header", "name": "a b"}}, "'a b' cannot be the name of a header"),
        ({"stable": "1", "rules": [{"values": ["a"], "to": "stable"}]}, "'key' is missing in one of the rules"),
        ({"stable": "1", "rules": [{"key": {}, "values": ["a"], "to": "2"}]}, "not to '2'"),
        ({"stable": "1", "rules": [{"key": {}, "values": [], "to": "stable"}]}, "names no value"),
        (
            {"stable": "1", "rules": [{"key": {}, "values": ["a\r\nb: c"], "to": "stable"}]},
            "cannot be the value of a header",
        ),
        ({"stable": "1", "rules": 5}, "not iterable"),
        ({"stable": "1", "weight": 5}, "a share of the traffic needs a candidate"),
        ({"candidate": "2", "weight": 5}, "without a stable version"),
    ],
)
def test_a_route_that_cannot_be_used_says_why(body: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        route_from(body, "m")
