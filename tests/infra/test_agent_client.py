"""The agent's client: every way in which the agent can be absent or wrong becomes one clear error, in bounded time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.agent_client import AgentAbsent, AgentClient, AgentError, AgentRefused, AgentRejected, route_in
from policies.traffic import Route


@contextmanager
def agent_saying(home: Path, answer: bytes | None) -> Iterator[list[bytes]]:
    """Something on the agent's socket that gives this answer to every request; None: says nothing."""
    (home / "agent.token").write_text("secret")
    asked: list[bytes] = []
    silent: list[socket.socket] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "agent.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            request = connection.recv(65536)
            asked.append(request)
            if answer is None:
                silent.append(connection)
                continue
            connection.sendall(answer)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in silent:
            connection.close()


def http(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()


def test_an_agent_that_never_ran_says_so(tmp_path: Path) -> None:
    with pytest.raises(AgentAbsent, match="no agent has been started on"):
        AgentClient(tmp_path).status()


def test_an_agent_that_does_not_listen_any_more_says_so(tmp_path: Path) -> None:
    with agent_saying(tmp_path, b""):
        pass
    with pytest.raises(AgentAbsent, match=r"does not listen on .*is it running"):
        AgentClient(tmp_path).renew("m", 1)


def test_an_agent_that_hangs_is_absent_after_the_time_out(tmp_path: Path) -> None:
    with (
        agent_saying(tmp_path, None),
        pytest.raises(AgentAbsent, match="did not answer GET /v1/status in time"),
    ):
        AgentClient(tmp_path, timeout_s=0.2).status()


def test_an_agent_that_hangs_up_is_absent(tmp_path: Path) -> None:
    with (
        agent_saying(tmp_path, b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"),
        pytest.raises(AgentAbsent, match="the connection to the agent broke during GET"),
    ):
        AgentClient(tmp_path).status()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("400 Bad Request", AgentRejected),
        ("401 Unauthorized", AgentRejected),
        ("404 Not Found", AgentRejected),
        ("409 Conflict", AgentRefused),
        ("500 Internal Server Error", AgentError),
        ("503 Service Unavailable", AgentError),
        ("507 Insufficient Storage", AgentError),
    ],
)
def test_the_agent_s_sentence_and_facts_arrive(tmp_path: Path, status: str, error: type[AgentError]) -> None:
    with (
        agent_saying(tmp_path, http(status, '{"error": "so it is", "epoch": 7}')),
        pytest.raises(AgentError, match="so it is") as said,
    ):
        AgentClient(tmp_path).set_route(Route("m", "1", epoch=3))
    assert type(said.value) is error
    assert said.value.facts["epoch"] == 7


def test_an_answer_that_is_no_json_is_shown(tmp_path: Path) -> None:
    with (
        agent_saying(tmp_path, http("200 OK", "<html>")),
        pytest.raises(AgentError, match="is not JSON: '<html>'"),
    ):
        AgentClient(tmp_path).status()


def test_names_cannot_reach_other_paths_and_the_token_goes_along(tmp_path: Path) -> None:
    with agent_saying(tmp_path, http("200 OK", "{}")) as asked:
        AgentClient(tmp_path).undeploy("../m", "1/../../2")
    assert asked[0].startswith(b"DELETE /v1/models/..%2Fm/versions/1%2F..%2F..%2F2 HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in asked[0]


def test_a_route_is_read_back_from_a_status() -> None:
    held = {"model": "m", "stable": "1", "candidate": "2", "weight": 5, "shadow": 0, "epoch": 3, "lease_s": 9.0}
    assert route_in({**held, "lease_left_s": 4.0, "lease_lost": None}) == Route("m", "1", "2", 5, 0, 3, 9.0)
