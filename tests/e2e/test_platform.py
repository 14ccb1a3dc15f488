"""The whole platform on one PostgreSQL server: well by its own word, also after each of its parts was killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.e2e import hints, toy
from tests.e2e.deaths import Cell, Lane, Nursery, line, write_rows
from tests.e2e.hints import part
from tests.e2e.running_platform import Clients, Platform, running_platform, wait_until
from tests.infra.postgresql_server import postgresql, programs_or_skip

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::Warning")]

PARTS = {
    "Prefect": "prefect server start",
    "MLflow": "mlflow server",
    "Agent": "serving.agent",
    "Worker": "flows.worker",
    "Receiver": "flows.receiver",
    "Reconciler": "flows.reconciler",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql(programs_or_skip()) as url:
        yield url


@pytest.fixture(scope="module")
def platform(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    files, home = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("home")
    (files / "toy.yaml").write_text(toy.POLICY)
    hints.prepare(home)
    with running_platform(home, files, LOCKGATE_DATABASE=server, LOCKGATE_REGISTRY_POLL_S=str(hints.POLL_S)) as made:
        yield made


def wrong(platform: Platform) -> dict[str, str]:
    """What `lockgate doctor` finds wrong."""
    seen = platform.lockgate("doctor", "--json")
    assert seen.out, seen.err
    found = {each["what"]: each["says"] for each in seen.json if not each["ok"]}
    assert seen.code == (1 if found else 0)
    return found


def test_one_setting_puts_all_three_databases_on_postgresql_and_a_delivery_goes_through(
    platform: Platform, server: str
) -> None:
    wait_until(lambda: not wrong(platform), 60, "the platform is well by its own word")
    run = platform.deliver(toy.make(platform.files / "v1"))
    assert run.code == 0, run.err + run.out
    counted = {}
    tables = {"lockgate_prefect": "flow_run", "lockgate_mlflow": "model_versions", "lockgate": "lockgate_entries"}
    for name, table in tables.items():
        with psycopg.connect(server.replace("/postgres?", f"/{name}?")) as connection:
            counted[name] = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert all(row is not None and row[0] > 0 for row in counted.values()), counted
    assert not list(platform.home.glob("*.db")), "nothing is in files besides"
    assert platform.lockgate("audit", "verify").code == 0
    # A command that was not told of the database must not begin a second ledger.
    other = platform.lockgate("status", LOCKGATE_DATABASE="")
    assert other.code == 2
    assert "LOCKGATE_DATABASE" in other.err


def test_every_part_that_is_killed_comes_back_and_then_a_delivery_goes_through(platform: Platform) -> None:
    before = {name: part(platform, PARTS[name]) for name in PARTS}
    assert all(before.values()), before
    with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST) as traffic:
        for process in before.values():
            assert process is not None
            process.send_signal(signal.SIGKILL)
        for name, old in before.items():
            assert old is not None
            wait_until(lambda: (now := part(platform, PARTS[name])) is not None and now.pid != old.pid, 120, name)  # noqa: B023
        wait_until(lambda: not wrong(platform), 120, "the platform is well again by its own word")
        run = platform.deliver(toy.make(platform.files / "v2", seed=2))
        assert run.code == 0, run.err + run.out
    assert traffic.failed() == [], "the gateway and the servers went on without the agent"


@pytest.fixture(scope="module")
def lane(platform: Platform) -> Iterator[Lane]:
    """Another model in service, and clients that ask it."""
    write_rows(platform.files / "rows")
    with Nursery(platform) as nursery:
        made = Lane(platform, nursery, "m0")
        try:
            made.begin()
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("victim", ["flow", "node agent"])
def test_who_dies_at_the_canary_leaves_none_behind_and_costs_no_request(lane: Lane, victim: str) -> None:
    """Two of the deaths that `make deaths` plays completely."""
    result = lane.play(Cell(victim, "promoted", "canary 40 %"))
    assert result.kept, line(result)


def test_a_rehearsal_on_recorded_traffic_says_how_it_would_have_gone_and_changes_nothing(platform: Platform) -> None:
    policy = platform.files / "rehearsed.yaml"
    policy.write_text(toy.POLICY.replace("  gates:\n", "  gates:\n    disagreement: {margin: 0.1, tolerance: 0.1}\n"))
    flipped = toy.make(platform.files / "flipped", seed=4, flipped=True)
    book = platform.ledger()
    try:
        before = book.head(), platform.versions()
        with Clients(platform.ports["GATEWAY"], "toy", toy.REQUEST):
            time.sleep(6)  # what is recorded has to last some seconds: no condition to wait for
        bad = platform.lockgate("rehearse", "toy", "--file", flipped / "model.onnx", "--policy", policy, "--json")
        assert (bad.code, bad.json["outcome"]) == (1, "rolled_back"), bad.err + bad.out
        assert "disagreement" in bad.json["why"]
        rows = ("--rows", flipped / "validation.csv", "--rps", 100)
        same = platform.lockgate("rehearse", "toy", "--file", platform.files / "v1" / "model.onnx", "-p", policy, *rows)
        assert same.code == 0, same.err + same.out
        assert (book.head(), platform.versions()) == before
    finally:
        book.close()
