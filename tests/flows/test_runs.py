"""The Prefect server as lockgate asks it: once, for a limited time, and with errors of its own ports."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from prefect.client.schemas.actions import VariableCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from flows import runs
from infra import herald_prefect
from tasks.ports import PortError
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

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
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
    monkeypatch.setattr(runs, "_TIMEOUT_S", _TIMEOUT_S)
    since = time.monotonic()
    with temporary_settings({PREFECT_API_URL: hung}), pytest.raises(PortError, match="timed out"):
        ask()
    assert time.monotonic() - since < 3 * _TIMEOUT_S


def test_a_run_that_somebody_has_deleted_is_an_error_of_the_port(empty: str) -> None:
    with temporary_settings({PREFECT_API_URL: empty}), pytest.raises(PortError, match="404"), runs.client() as server:
        server.set_flow_run_state("8a3c2b1e-0000-4000-8000-000000000000", Crashed(), force=True)


def test_a_variable_that_somebody_has_deleted_is_an_error_of_the_port(empty: str) -> None:
    with temporary_settings({PREFECT_API_URL: empty}), pytest.raises(PortError, match=r"noted: .*404"):
        herald_prefect.PrefectHerald().note_told(7)


def test_each_of_two_ledgers_that_tell_one_server_is_noted_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, int] = {}

    class Server:
        def read_variable_by_name(self, name: str) -> SimpleNamespace | None:
            return SimpleNamespace(value=kept[name]) if name in kept else None

        def create_variable(self, made: VariableCreate) -> None:
            kept[made.name] = made.value

    monkeypatch.setattr(herald_prefect, "_server", lambda _failed: nullcontext(Server()))
    one, other, empty = World(), World(), World()
    one.drive()
    other.request("another")
    heralds = [herald_prefect.PrefectHerald(world.ledger) for world in (one, other, empty)]
    heralds[0].note_told(7)
    assert [herald.told_up_to() for herald in heralds] == [7, None, None]
    again = herald_prefect.PrefectHerald(one.ledger)
    one.drive("r2")
    assert again.told_up_to() == 7
