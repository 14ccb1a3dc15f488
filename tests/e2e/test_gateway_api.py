"""The admin API as whoever reaches the socket meets it, and the access log."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.serving.running_agent import RunningAgent, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path_factory.mktemp("api"), "--access-log")
    try:
        yield running.start()
    finally:
        running.stop()


@pytest.fixture
def http(agent: RunningAgent) -> Iterator[httpx.Client]:
    token = (agent.home / "agent.token").read_text()
    transport = httpx.HTTPTransport(uds=str(agent.home / "agent.sock"))
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(transport=transport, base_url="http://agent", headers=headers) as client:
        yield client


def test_socket_token_and_state_are_the_owner_s_alone(agent: RunningAgent) -> None:
    for name in ("agent.sock", "agent.token"):
        assert (agent.home / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("token", ["", "Bearer wrong", "Basic x"])
def test_without_the_token_nothing_is_answered(http: httpx.Client, token: str) -> None:
    for method, path in (("GET", "/v1/status"), ("PUT", "/v1/models/m/route"), ("GET", "/nowhere")):
        answer = http.request(method, path, headers={"Authorization": token})
        assert answer.status_code == 401
        assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "sentence"),
    [
        ("PUT", "/v1/models/m/versions/1", "{", 400, "the body is not JSON"),
        ("PUT", "/v1/models/m/versions/1", "[]", 400, "must be a JSON object, not list"),
        ("PUT", "/v1/models/m/versions/1", "{}", 400, "'path' must name the model's file"),
        ("PUT", "/v1/models/m/versions/1", '{"path": "x"}', 400, "'digest' is missing"),
        ("PUT", "/v1/models/m/versions/1", '{"path": "x", "digest": "abc"}', 400, "'abc' is no SHA-256 in hex"),
        ("PUT", "/v1/models/m/versions/1", '{"path": "x", "replica": 2}', 400, "unknown field 'replica'"),
        ("PUT", "/v1/models/m/versions/1", '{"path": "x", "replicas": "2"}', 400, "'replicas' cannot be '2'"),
        ("PUT", "/v1/models/-m/versions/1", '{"path": "x", "digest": "abc"}', 400, "'-m' is no name for a model"),
        ("PUT", "/v1/models/m/route", '{"stable": "9", "epoch": 1}', 409, "version 9 of m is not deployed here"),
        ("PUT", "/v1/models/m/route", '{"epoch": "1"}', 400, "'epoch' must be a whole number, not '1'"),
        ("POST", "/v1/models/m/lease", '{"epoch": null}', 400, "'epoch' must be a whole number, not None"),
        ("POST", "/v1/models/nope/lease", '{"epoch": 1}', 409, "nope has no route here"),
        ("GET", "/v1/events?after=-1", "", 400, "'after' must be the number of an event, not '-1'"),
        ("GET", "/v1/nowhere", "", 404, "GET /v1/nowhere: Not Found"),
        ("PATCH", "/v1/status", "", 405, "PATCH /v1/status: Method Not Allowed"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    http: httpx.Client, method: str, path: str, body: str, status: int, sentence: str
) -> None:
    answer = http.request(method, path, content=body)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_every_request_leaves_a_line_of_json_in_the_access_log(agent: RunningAgent) -> None:
    agent.deploy("7", model="logged")
    agent.route("7", model="logged", epoch=1)
    agent.ask("/v2/models/logged/infer", x_request_id="order-99")
    log = agent.home / "logs" / "access.log"

    def line() -> dict[str, object] | None:
        lines = log.read_text().splitlines() if log.exists() else []
        return next((json.loads(one) for one in lines if "order-99" in one), None)

    logged = until(line, "the line is written")
    assert (logged["version"], logged["status"], logged["attempts"]) == ("7", 200, 1)
    assert logged["path"] == "/v2/models/logged/infer"


def test_a_body_beyond_the_limit_is_refused_before_it_reaches_a_server(agent: RunningAgent) -> None:
    agent.deploy("1", model="large")
    agent.route("1", model="large", epoch=1)
    url = f"http://127.0.0.1:{agent.port}/v2/models/large/infer"
    assert httpx.post(url, content=b"x" * 1_000_000, timeout=20).json()["bytes"] == 1_000_000
    assert httpx.post(url, content=b"x" * (33 * 1024 * 1024), timeout=20).status_code == 413
