"""A hint is believed if MLflow signed it, just now, and only once."""

from __future__ import annotations

import json

import pytest

from infra.hints_mlflow import Doorkeeper, Unbelievable, signature

SECRET, NOW = "s3cret", 1_000_000.0
BODY = json.dumps(
    {"entity": "model_version_alias", "data": {"name": "m", "alias": "candidate", "version": "3"}}
).encode()


def hint(body: bytes = BODY, delivery: str = "d1", stamp: str = "1000000", secret: str = SECRET) -> dict[str, str]:
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": signature(secret, delivery, stamp, body).decode(),
    }


def why(keeper: Doorkeeper, headers: dict[str, str], body: bytes = BODY, now: float = NOW) -> str:
    try:
        keeper.believe(headers, body, now)
        return "believed"
    except Unbelievable as exc:
        return exc.why


@pytest.fixture
def keeper() -> Doorkeeper:
    return Doorkeeper(SECRET, since=NOW - 10_000)


@pytest.mark.filterwarnings("ignore::Warning")  # MLflow's own; none is about what we call
def test_the_signature_is_mlflow_s() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    assert signature(SECRET, "d", "17", BODY).decode() == _generate_hmac_signature(SECRET, "d", "17", BODY.decode())


def test_a_hint_is_believed_once(keeper: Doorkeeper) -> None:
    assert [why(keeper, hint()) for _ in range(2)] == ["believed", "replayed"]
    assert why(keeper, hint(delivery="d2")) == "believed"


@pytest.mark.parametrize(
    "changed",
    [
        hint(secret="another"),
        hint() | {"X-MLflow-Delivery-Id": "d2"},
        hint() | {"X-MLflow-Timestamp": "1000001"},
        hint() | {"X-MLflow-Signature": "v1,äöü"},
        hint(body=BODY + b" "),
        {},
    ],
)
def test_whatever_was_not_signed_so_is_forged(keeper: Doorkeeper, changed: dict[str, str]) -> None:
    assert why(keeper, changed) == "forged"


@pytest.mark.parametrize(
    ("stamp", "said"), [("999701", "believed"), ("999699", "stale"), ("1000061", "stale"), ("nan", "stale")]
)
def test_an_old_hint_is_stale_and_so_is_one_from_the_future(keeper: Doorkeeper, stamp: str, said: str) -> None:
    assert why(keeper, hint(stamp=stamp)) == said


def test_what_a_predecessor_may_have_seen_is_stale() -> None:
    keeper = Doorkeeper(SECRET, since=NOW - 5)
    assert why(keeper, hint(stamp=str(int(NOW - 6)))) == "stale"
    assert why(keeper, hint(stamp=str(int(NOW - 5)))) == "believed"


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"data": {"name": 7}}', b"\xff"])
def test_what_names_no_model_is_malformed(keeper: Doorkeeper, body: bytes) -> None:
    assert why(keeper, hint(body=body), body) == "malformed"


def test_the_memory_of_deliveries_is_bounded_by_their_age(keeper: Doorkeeper) -> None:
    for second in range(1000):
        now = NOW + second
        assert why(keeper, hint(delivery=f"d{second}", stamp=str(int(now))), now=now) == "believed"
    assert len(keeper._seen) < 400
