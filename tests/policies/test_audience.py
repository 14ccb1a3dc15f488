"""Who always or never meets a candidate, as the policy says it and as the route carries it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from policies.audience import Audience
from policies.policy import PolicyError
from policies.policy_yaml import parse
from policies.traffic import Key, Route, Rule, route_of
from policies.words import explain

POLICY = """
policy: flights
rollout:
  stages:
    - shadow: {share: 1.0, for: 2m}
    - canary: {weight: 5, for: 5m}
  audience:
    user_header: X-User
    always: {users: [ann, bob], headers: {X-Beta: ["1", "yes"]}}
    never: {tenants: [bank]}
"""
RULES = (
    Rule(Key("header", "x-lockgate-tenant"), ("bank",), "stable"),
    Rule(Key("header", "x-user"), ("ann", "bob"), "candidate"),
    Rule(Key("header", "x-beta"), ("1", "yes"), "candidate"),
)


def test_the_policy_s_audience_becomes_the_route_s_key_and_rules() -> None:
    audience = parse(POLICY).rollout.audience
    assert audience.key == Key("header", "x-user")
    assert audience.rules == RULES


def test_users_are_told_by_a_cookie_where_the_policy_says_so() -> None:
    audience = Audience.model_validate({"user_cookie": "session", "always": {"users": ["ann"]}})
    assert audience.key == Key("cookie", "session")
    assert audience.rules == (Rule(Key("cookie", "session"), ("ann",), "candidate"),)


def test_without_an_audience_the_common_header_keeps_users_with_their_version() -> None:
    assert (Audience().key, Audience().rules) == (Key("header", "x-lockgate-key"), ())


def test_explain_says_who_always_and_who_never_meets_the_candidate() -> None:
    text = "\n".join(explain(parse(POLICY)))
    assert "the header x-user decides" in text
    assert "x-lockgate-tenant: bank, stay with the stable version, uncopied" in text
    assert "x-user: ann, bob, go to the candidate in every canary stage; they count for no gate" in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{tenants: [bank]}", "{users: [bob]}", "'bob' is both in `always` and in `never`"),
        ("{tenants: [bank]}", "{tenant: [bank]}", "did you mean 'tenants'?"),
        ("X-User", "x user", "'x user' cannot be the name of a header"),
        ("user_header: X-User", "user_cookie: 'a;b'", "'a;b' cannot be the name of a cookie"),
        ("[ann, bob]", '["ann\\n"]', "cannot be the value of a header"),
        ('["1", "yes"]', "[]", "at least 1 item"),
        ("{tenants: [bank]}", "{headers: {X-A: [vip], x-a: [bank]}}", "header 'x-a' is named twice"),
        ("{tenants: [bank]}", f"{{users: [{', '.join(f'u{n}' for n in range(1000))}]}}", "more than 1000 values"),
        ("user_header: X-User", "user_header: X-User\n    user_cookie: session", "not by both"),
        ("    - canary: {weight: 5, for: 5m}\n", "", "`audience.always` needs a canary stage"),
    ],
)
def test_what_cannot_be_meant_is_told(old: str, new: str, words: str) -> None:
    assert old in POLICY
    with pytest.raises(PolicyError) as told:
        parse(POLICY.replace(old, new))
    assert words in str(told.value)


def test_a_route_survives_json() -> None:
    route = Route("m", "1", "2", weight=5, epoch=3, key=Key("cookie", "session"), rules=RULES)
    assert route_of(json.loads(json.dumps(asdict(route)))) == route
    assert route_of({"model": "m", "stable": "1"}) == Route("m", "1")


def test_more_values_than_the_gateway_should_look_through_are_refused() -> None:
    many = Rule(Key(), tuple(str(number) for number in range(1001)), "stable")
    with pytest.raises(ValueError, match="more than 1000 values"):
        Route("m", "1", "2", weight=5, rules=(many,))
