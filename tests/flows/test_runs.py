"""The Prefect server as lockgate asks it: once, for a limited time, and with errors of its own ports."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx
import pytest
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from flows import runs
from flows.relay import Relay
from flows.wiring import prefect_client
from infra import herald_prefect
from tasks.ports import PortError
from tasks.ports_monitor import Notice
from tests.stories.world import World

_TIMEOUT_S = 1.0


@pytest.fixture
def hung() -> Iterator[str]:
    """A server that accepts, and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"


@pytest.fixture
def empty() -> Iterator[str]:
    """A server that has nothing of what it is asked for."""
    with refusing(404) as url:
        yield url


@contextmanager
def refusing(status: int) -> Iterator[str]:
    """A server that says no to everything."""

    class No(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def do_POST(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), No) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()


def cancelled_runs() -> object:
    return runs.cancelled(["8a3c2b1e-0000-4000-8000-000000000000"])


@pytest.mark.parametrize("ask", [cancelled_runs, herald_prefect.PrefectHerald().told_up_to])
def test_a_server_that_hangs_is_waited_for_once(
    hung: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's client would try six times, with longer and longer pauses: a takeover would wait for minutes."""
    monkeypatch.setattr(herald_prefect, "_TIMEOUT_S", _TIMEOUT_S)
    monkeypatch.setattr(runs, "prefect_client", lambda: prefect_client(_TIMEOUT_S))
    since = time.monotonic()
    with temporary_settings({PREFECT_API_URL: hung}), pytest.raises(PortError, match="timed out"):
        ask()
    assert time.monotonic() - since < 3 * _TIMEOUT_S


def test_a_server_that_is_busy_says_no_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's client sleeps for seconds after such an answer, and only then sees that it has no more tries."""
    slept: list[float] = []
    monkeypatch.setattr("prefect.client.base.time.sleep", slept.append)
    with (
        refusing(503) as busy,
        temporary_settings({PREFECT_API_URL: busy}),
        pytest.raises(PortError, match="503"),
        prefect_client() as server,
    ):
        server.set_flow_run_state("8a3c2b1e-0000-4000-8000-000000000000", Crashed(), force=True)
    assert slept == []


def test_a_run_that_somebody_has_deleted_is_an_error_of_the_port(empty: str) -> None:
    with (
        temporary_settings({PREFECT_API_URL: empty}),
        pytest.raises(PortError, match="404"),
        prefect_client() as server,
    ):
        server.set_flow_run_state("8a3c2b1e-0000-4000-8000-000000000000", Crashed(), force=True)


def test_a_variable_that_somebody_has_deleted_is_an_error_of_the_port(empty: str) -> None:
    with temporary_settings({PREFECT_API_URL: empty}), pytest.raises(PortError, match=r"noted: .*404"):
        herald_prefect.PrefectHerald().note_told(7)


def test_an_older_entry_whose_text_is_none_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no event after it would ever be told."""
    sent: list[bytes] = []

    class Server:
        def request(self, method: str, path: str, json: object) -> None:
            sent.append(httpx.Request(method, f"http://server{path}", json=json).content)

    monkeypatch.setattr(herald_prefect, "client", lambda *_: nullcontext(Server()))
    notice = Notice("r1:3", "lockgate.rollout.paused", "m", "2", 1.0, {"reason": "caf\udce9", "share": 5}, "r1")
    herald_prefect.PrefectHerald().tell(notice)
    (event,) = json.loads(sent[0])
    assert event["payload"] == {"reason": "caf\ufffd", "share": 5}


class Variables:
    """The part of Prefect's client that keeps how far was told."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def read_variable_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(value=self.kept[name]) if name in self.kept else None

    def create_variable(self, made: VariableCreate) -> None:
        self.kept[made.name] = made.value

    def update_variable(self, made: VariableUpdate) -> None:
        self.kept[made.name] = made.value

    def delete_variable_by_name(self, name: str) -> None:
        del self.kept[name]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Variables:
    made = Variables()
    monkeypatch.setattr(herald_prefect, "client", lambda *_: nullcontext(made))
    return made


@pytest.mark.usefixtures("variables")
def test_each_of_two_ledgers_that_tell_one_server_is_noted_for_itself() -> None:
    one, other, empty = World(), World(), World()
    one.drive()
    other.request("another")
    heralds = [herald_prefect.PrefectHerald(world.ledger) for world in (one, other, empty)]
    heralds[0].note_told(7)
    assert [herald.told_up_to() for herald in heralds] == [7, None, None]
    again = herald_prefect.PrefectHerald(one.ledger)
    one.drive("r2")
    assert again.told_up_to() == 7


def test_what_comes_to_an_empty_ledger_is_told_once_whoever_tells_it(variables: Variables) -> None:
    """The ledger's variable gets its name from the first entry; what was noted before goes with it."""

    class Herald(herald_prefect.PrefectHerald):
        def tell(self, notice: Notice) -> None:
            told.append(notice.event)

    told: list[str] = []
    world = World()
    Relay(world.ledger, Herald(world.ledger)).pass_on()  # the platform has started, and nothing has been delivered yet
    world.drive()
    Relay(world.ledger, Herald(world.ledger)).pass_on()  # after a restart
    assert (told[0], told[-1]) == ("lockgate.rollout.started", "lockgate.rollout.promoted")
    once = len(told)
    Relay(world.ledger, Herald(world.ledger)).pass_on()
    assert len(told) == once
    assert list(variables.kept) == [f"lockgate_told_{world.ledger.read('r1')[0].hash[:12]}"]

    other = World()
    other.drive("long ago")  # elsewhere: its history is no news here
    assert Herald(other.ledger).told_up_to() is None


def test_how_far_an_older_installation_had_told_is_where_the_next_goes_on(variables: Variables) -> None:
    world = World()
    world.drive()
    variables.kept["lockgate_told"] = 3
    herald = herald_prefect.PrefectHerald(world.ledger)
    assert herald.told_up_to() == 3
    herald.note_told(5)
    assert (herald.told_up_to(), len(variables.kept)) == (5, 1)
