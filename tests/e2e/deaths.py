"""The death of anything at any moment, on the real platform under live load: `python -m tests.e2e.deaths`.

For each victim and each state that a rollout passes through (walked with the machine itself, so that none is left
out): a delivery, and as soon as the entry that leads to the state is durable, kill -9 of the victim. Then the rollout
must end as it would have without, or on the stable version; each of its steps must stand in the ledger exactly once;
and no client may notice where a healthy copy was there. Prints a table; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper
from sqlalchemy.engine import make_url

from flows.record import replay
from flows.story import fold
from infra import health_local
from infra.agent_client import AgentClient
from policies import audit
from policies.events import Checked, Do, Done, Looked, Phase, Requested
from policies.policy import Policy
from policies.policy_yaml import parse
from policies.rollout import Rollout, step, terms
from policies.verdict import Verdict
from tasks.ports import Entry, PortError
from tests.e2e.deadly import name_of
from tests.e2e.running_platform import Clients, Platform, running_platform, wait_until
from tests.infra.postgresql_server import immortal, programs_or_skip
from tests.serving.models import save

POLICY = """
policy: deaths
benchmark: {duration: 1s, regression_max: 1000}
validate: {quality: {margin: 0.2}}
rollout:
  stages:
    - shadow: {share: 1.0, for: 1s}
    - canary: {weight: 40, for: 1s}
  gates:
    errors: {margin: 0.2}
  watch: {for: 1s, shadow: 0.5}
  look_every: 500ms
  burn_in: 200ms
  patience: 60s
  lease: 3s
"""
SHADOW = "    - shadow: {share: 1.0, for: 1s}\n"
SETTLED_S = 150.0  # the worst: a Prefect server that starts anew on a busy machine, and a reconciler that takes over
LEASE_S = 3.0  # as the policy says
BACK_S = 5.0  # from when the agent says who serves alone until every client notices
OUTAGE_S = 15.0  # of the one gateway: nobody else could answer
TRIES = 3  # a rollout that never comes to the state, since the machine is busy, is begun anew
PLAIN = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 0.2, 0.3, 0.4]}
TRAP = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 0.2, 0.3, 5000.0]}

SERVERS = ("flow", "canary server", "stable server")
PARTS = ("node agent", "Envoy", "Prefect server", "MLflow server")
DATABASE = "PostgreSQL"  # holds the ledger of a platform of its own
ENDS = ("promoted", "rolled back", "refused")


# ---------------------------------------------------------------- the states, from the machine


def policy_for(ends: str) -> str:
    """A version that fails under live traffic is told at the canary, not before."""
    return POLICY.replace(SHADOW, "") if ends == "rolled back" else POLICY


def walk(policy: Policy, ends: str) -> Iterator[Rollout]:
    """The states of a rollout with such an end, each from the event that naturally comes next."""
    at, number = 0.0, 1
    state, _ = step(None, Requested(at, number, "m", "2", "digest", "1", terms(policy)))
    while True:
        yield state
        if state.settled:
            return
        at, number = at + 60.0, number + 1
        if state.pending and state.pending[0].do is Do.CHECK:
            verdict = Verdict.FAIL if ends == "refused" else Verdict.PASS
            event: Any = Checked(at, number, verdict, "")
        elif state.pending:
            event = Done(at, number, state.pending[0].id)
        elif state.outbox:
            event = Done(at, number, state.outbox[0].id)
        else:
            bad = ends == "rolled back" and state.phase is Phase.CANARY
            event = Looked(at, number, Verdict.FAIL if bad else Verdict.PASS, "")
        state, _ = step(state, event)


def transitions(ends: str) -> list[str]:
    """The names of the states."""
    return [name_of(state) for state in walk(parse(policy_for(ends)), ends)]


@dataclass(frozen=True)
class Cell:
    """Who dies, in a rollout that would end how, and when."""

    victim: str
    ends: str
    at: str

    def __str__(self) -> str:
        return f"{self.victim}: {self.at} ({self.ends})"


def cells(victims: Sequence[str]) -> list[Cell]:
    """The complete matrix of the victims; a state that two ends share is visited once."""
    made = []
    for victim in victims:
        seen: set[str] = set()
        for ends in ENDS:
            made += [Cell(victim, ends, at) for at in transitions(ends) if at not in seen]
            seen.update(transitions(ends))
    return made


# ---------------------------------------------------------------- models


def write_rows(folder: Path) -> None:
    """Labelled rows, what the model answers to them, and what it does not."""
    folder.mkdir(parents=True)
    rows = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)
    seen = 1 / (1 + np.exp(-rows.sum(axis=1)))
    names = "a,b,c,d"
    for name, column, values in (
        ("validation", "label", (seen > 0.5).astype(int)),
        ("expected", "prediction", seen),
        ("unexpected", "prediction", 1 - seen),
    ):
        lines = [",".join(f"{value:.9g}" for value in (*row, last)) for row, last in zip(rows, values, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join([f"{names},{column}", *lines]) + "\n")


def write_model(path: Path, note: str, trap: bool) -> None:
    """The sigmoid of the row's sum; with `trap` it errs if the last value is beyond 1000. `note` makes new bytes."""
    nodes = [
        helper.make_node("ReduceSum", ["X", "axis"], ["sum"], keepdims=1),
        helper.make_node("Sigmoid", ["sum"], ["score"]),
    ]
    constants = [("axis", np.array([1], dtype=np.int64))]
    if trap:
        nodes = [
            helper.make_node("Gather", ["X", "last"], ["d"], axis=1),
            helper.make_node("Greater", ["d", "limit"], ["caught"]),
            helper.make_node("Cast", ["caught"], ["at"], to=TensorProto.INT64),
            helper.make_node("Gather", ["nothing", "at"], ["zero"]),
            helper.make_node("ReduceSum", ["X", "axis"], ["sum"], keepdims=1),
            helper.make_node("Add", ["sum", "zero"], ["sum0"]),
            helper.make_node("Sigmoid", ["sum0"], ["score"]),
        ]
        constants += [
            ("last", np.array([3], dtype=np.int64)),
            ("limit", np.array(1000, dtype=np.float32)),
            ("nothing", np.zeros(1, dtype=np.float32)),
        ]
    shapes = [("X", TensorProto.FLOAT, ["N", 4])], [("score", TensorProto.FLOAT, ["N", 1])]
    save(path, nodes, *shapes, constants, {"note": note})
    onnx.checker.check_model(str(path))


# ---------------------------------------------------------------- a delivery that somebody dies in


class Nursery:
    """Starts deliveries quickly: see `deadly`."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self._lock = threading.Lock()
        with (platform.files / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.deadly"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=platform.environment(),
            )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._answers, self._asks = self._process.stdout, self._process.stdin
        assert self._answers.readline() == "ready\n", (platform.files / "nursery.log").read_text()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._asks.close()
        self._process.wait(20)
        self._answers.close()

    def start(self, **job: Any) -> int:
        """The delivery is under way; the number of its process."""
        with self._lock:
            self._asks.write(json.dumps(job) + "\n")
            self._asks.flush()
            return int(self._answers.readline())


class NotBegun(AssertionError):
    """The delivery ended, or hung, before it had written its request: nothing was at stake yet."""


@dataclass
class Result:
    """What became of a cell; no problem, and the promises were kept."""

    cell: Cell
    ended: str = ""
    failed: int = 0
    seconds: float = 0.0
    requests: int = 0
    why: str = ""
    reached: bool = False
    met_nobody: bool = False  # the victim had ended before, as the rollout has it there
    problems: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return not self.problems


class Lane:
    """One model, delivered to again and again under live load."""

    _count = itertools.count()

    def __init__(self, platform: Platform, nursery: Nursery, model: str) -> None:
        self.platform, self.nursery, self.model = platform, nursery, model
        self.folder = platform.files / model
        self.folder.mkdir()
        self.ledger = platform.ledger()
        self.agent = AgentClient(platform.home / "agent")
        self.clients: Clients | None = None

    def begin(self) -> None:
        """The model's first version serves, and its clients ask."""
        name = self.deliver(Cell("", "promoted", ""), first=True)
        state = self.settled(name)
        assert state is not None
        assert state.phase is Phase.PROMOTED, self.last_log()
        self.clients = Clients(self.platform.ports["GATEWAY"], self.model, PLAIN, TRAP)
        self.clients.__enter__()

    def close(self) -> None:
        if self.clients is not None:
            self.clients.__exit__()
        self.ledger.close()

    def deliver(self, cell: Cell, first: bool = False, number: int = signal.SIGKILL) -> str:
        """Starts a delivery with bytes of its own, in which the victim gets the signal; the rollout's name once it is
        requested. Raises NotBegun if it never is."""
        count = next(self._count)
        path = self.folder / f"{count}.onnx"
        write_model(path, f"{self.model} {count}", trap=cell.ends == "rolled back")
        rows = self.platform.files / "rows"
        expected = "unexpected" if cell.ends == "refused" else "expected"
        request = {
            "model": self.model,
            "source": str(path),
            "policy": POLICY if first else policy_for(cell.ends),
            "files": {"validation": str(rows / "validation.csv"), "expected": str(rows / f"{expected}.csv")},
        }
        before = self.ledger.rollouts(self.model)
        self.log = self.folder / f"{count}.log"
        victim = str(pid_file(self.platform)) if cell.victim == DATABASE else cell.victim
        pid = self.nursery.start(request=request, log=str(self.log), at=cell.at, victim=victim, signal=number)
        limit = time.monotonic() + SETTLED_S
        while True:
            gone = not psutil.pid_exists(pid)  # asked first: what it wrote before it ended is there
            rollouts = self.readable_rollouts()
            found = [name for name in rollouts or [] if name not in before]
            if found:
                return found[0]
            if (gone and rollouts is not None) or time.monotonic() > limit:
                how = "ended" if gone else f"hung for {SETTLED_S:g} s"
                raise NotBegun(f"the delivery {how} before its request was written: {self.last_log()}")
            time.sleep(0.2)

    def readable_rollouts(self) -> list[str] | None:
        """The model's rollouts; None while the ledger cannot be read."""
        with contextlib.suppress(PortError):  # the database is the victim
            return self.ledger.rollouts(self.model)
        return None

    def entries(self, name: str) -> list[Entry]:
        with contextlib.suppress(PortError):  # the database is the victim
            return self.ledger.read(name)
        return []

    def settled(self, name: str, seconds: float = SETTLED_S) -> Rollout | None:
        """The state once nothing is left to be done and the model is free; else as it is then."""
        limit = time.monotonic() + seconds
        state = None
        while time.monotonic() < limit:
            state = fold(self.entries(name)) or state
            if state is not None and state.settled:
                return state
            time.sleep(0.2)
        return state

    def last_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:]) if self.log.exists() else ""

    def struck(self) -> dict[str, Any] | None:
        """When and whom the signal met in the last delivery; None before."""
        note = self.log.with_name(self.log.name + ".struck")
        return json.loads(note.read_text()) if note.exists() and note.stat().st_size else None

    def play(self, cell: Cell) -> Result:
        """The delivery, the death, and what became of it."""
        for _ in range(TRIES):
            result = self._play_once(cell)
            if result.reached or result.problems:
                break
        else:
            result.problems.append(f"the rollout never was at '{cell.at}': {result.why}")
        return result

    def _play_once(self, cell: Cell) -> Result:
        assert self.clients is not None
        result = Result(cell)
        wait_until(self.all_answer, SETTLED_S, "Prefect, MLflow, the ledger and the node agent answer")
        began = time.monotonic()
        try:
            name = self.deliver(cell)
        except NotBegun as exc:
            result.why = str(exc)
            return result
        state = self.settled(name)
        result.seconds = time.monotonic() - began
        wait_until(lambda: self.readable_rollouts() is not None, SETTLED_S, "the ledger can be read")
        entries = self.ledger.read(name)
        struck = self.struck()
        result.reached = struck is not None
        if struck is not None and not struck["pids"]:
            result.met_nobody = True
            result.why = "the victim was dead already"
        result.problems += self._judge(cell, state, entries)
        result.problems += self._judge_clients(cell, began, result)
        result.ended = state.label if state else "not begun"
        if state and state.label != cell.ends:
            result.why = f"{result.why}; {state.reason}".removeprefix("; ")
        if result.problems:
            result.problems.append(f"rollout {name}; log {self.log}")
        return result

    def _judge(self, cell: Cell, state: Rollout | None, entries: list[Entry]) -> list[str]:
        if state is None or not state.settled:
            return [f"not settled after {SETTLED_S:.0f} s: {name_of(state) if state else 'no entry'}"]
        problems = []
        back = (Phase.ROLLED_BACK, Phase.REFUSED)
        if state.label != cell.ends and state.phase not in back:
            problems.append(f"ended {state.label}: {state.reason}")
        serving = state.candidate if state.phase is Phase.PROMOTED else state.stable
        try:
            wait_until(lambda: self.serves_alone(serving), 30.0)
        except AssertionError:
            problems.append(f"v{serving} should serve alone, the route is {self._route()}")
        problems += exactly_once(entries)
        _, differences = replay(entries)
        problems += [f"replay differs: {each}" for each in differences]
        return problems

    def all_answer(self) -> bool:
        """Whether a delivery can be begun: whoever was killed last is there again."""
        ports = self.platform.ports
        urls = [f"http://127.0.0.1:{ports['PREFECT']}/api/health", f"http://127.0.0.1:{ports['MLFLOW']}/health"]
        known = self._route() is not None and self.readable_rollouts() is not None
        return known and all(health_local.answers(url, 2.0) for url in urls)

    def _route(self) -> Any:
        with contextlib.suppress(Exception):  # the agent is the victim
            return self.agent.route(self.model)
        return None

    def shares(self, name: str) -> int:
        """The percentage that the rollout's canary has now."""
        route = self._route()
        return route.weight if route is not None and route.candidate == name.split("-v")[1].split("-")[0] else 0

    def serves_alone(self, version: str | None) -> bool:
        """Whether the agent says that nobody else has a share."""
        route = self._route()
        return route is not None and (route.stable, route.candidate) == (version, None)

    def _judge_clients(self, cell: Cell, began: float, result: Result) -> list[str]:
        clients = self.clients
        assert clients is not None
        state = fold(self.entries(self.ledger.rollouts(self.model)[0]))
        assert state is not None
        right = state.candidate if state.phase is Phase.PROMOTED else state.stable
        problems = []
        try:
            wait_until(lambda: clients.served(time.monotonic() - 0.4) == {right}, BACK_S)
        except AssertionError:
            seen = clients.served(time.monotonic() - 0.4)
            problems.append(f"clients are answered by {seen}, it should be v{right}")
        failed = clients.failed(began)
        result.failed = len(failed)
        result.requests = sum(answer.at >= began for answer in list(clients.answers))
        if failed and cell.victim != "Envoy":
            told = Counter(answer.failure for answer in failed).most_common(2)
            problems.append(f"{len(failed)} requests failed: {told}")
        elif failed and failed[-1].at - failed[0].asked > OUTAGE_S:
            problems.append(f"requests failed for {failed[-1].at - failed[0].asked:.1f} s")
        return problems


def exactly_once(entries: Sequence[Entry]) -> list[str]:
    """What stands twice in the ledger though it happened once."""
    steps = Counter(
        (entry.kind, entry.body.get("effect", ""))
        for entry in entries
        if entry.kind in ("requested", "checked", "done", "lost") or (entry.kind == "failed" and entry.body["final"])
    )
    problems = [f"{kind} {effect} stands {count} times" for (kind, effect), count in steps.items() if count > 1]
    if [entry.sequence for entry in entries] != list(range(1, len(entries) + 1)):
        problems.append("the entries' sequence has holes")
    return problems


# ---------------------------------------------------------------- the matrix


def pid_file(platform: Platform) -> Path:
    """Where PostgreSQL says who it is."""
    query = make_url(platform.env["LOCKGATE_LEDGER_URL"]).query
    return Path(str(query["host"])) / "data" / "postmaster.pid"


def in_lanes(platform: Platform, lanes: int, work: Callable[[Lane, int], None]) -> None:
    """The work on so many models side by side, each in service and asked by clients. Raises what it raised first."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        lane = Lane(platform, nursery, f"m{number}")
        try:
            lane.begin()
            work(lane, number)
        except BaseException as exc:  # noqa: BLE001 - raised again below
            errors.append(exc)
        finally:
            lane.close()

    with Nursery(platform) as nursery:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def play_all(platform: Platform, wanted: Sequence[Cell], lanes: int, tell: Any = lambda _result: None) -> list[Result]:
    """Every cell, so many side by side, each on a model of its own."""
    todo: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in wanted:
        todo.put(cell)
    results: list[Result] = []

    def work(lane: Lane, _number: int) -> None:
        while True:
            try:
                cell = todo.get_nowait()
            except queue.Empty:
                return
            result = lane.play(cell)
            results.append(result)
            tell(result)

    in_lanes(platform, lanes, work)
    return results


def chain_is_sound(platform: Platform) -> str:
    """Why the ledger's chain does not verify; nothing if it does."""
    ledger = platform.ledger()
    try:
        breach = audit.verify(ledger.lines(), ledger.head()).breach
    finally:
        ledger.close()
    return f"entry {breach.number}: {breach.why}" if breach else ""


def line(result: Result) -> str:
    cell = result.cell
    mark = "kept  " if result.kept else "BROKEN"
    figures = f"{result.failed:>4} of {result.requests:>5} failed {result.seconds:6.1f} s"
    why = f"\n       {result.why}" if result.why else ""
    return f"{mark} {cell.victim:<15} {cell.at:<52} -> {result.ended:<14} {figures}{why}" + "".join(
        f"\n       {problem}" for problem in result.problems
    )


def play_on_own_platform(home: Path, files: Path, wanted: Sequence[Cell], lanes: int) -> int:
    """Plays the cells and prints what became of each; how many promises were broken."""
    with contextlib.ExitStack() as stack:
        env = {}
        if wanted[0].victim == DATABASE:
            env["LOCKGATE_LEDGER_URL"] = stack.enter_context(immortal(programs_or_skip()))
        platform = stack.enter_context(running_platform(home, files, **env))
        results = play_all(platform, wanted, lanes, lambda result: print(line(result), flush=True))
        why = chain_is_sound(platform)
    broken = sum(not result.kept for result in results) + bool(why)
    nobody = sum(result.met_nobody for result in results)
    for victim in {result.cell.victim for result in results}:
        if all(result.met_nobody for result in results if result.cell.victim == victim):
            print(f"{victim}: no cell met one, so nothing was seen", flush=True)
            broken += 1
    deaths = f"{len(results) - nobody} deaths, {nobody} where the victim was dead already"
    print(f"{deaths}; {broken} broken promises; the chain is {why or 'sound'}", flush=True)
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everybody = [*SERVERS, *PARTS, DATABASE]
    parser.add_argument("--victims", nargs="*", default=everybody, choices=everybody, metavar="VICTIM")
    parser.add_argument("--at", default="", help="only states whose name contains this")
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockgate-deaths-"))
    broken = 0
    try:
        (folder / "files").mkdir()
        write_rows(folder / "files" / "rows")
        wanted = [cell for cell in cells(given.victims) if given.at in cell.at]
        for name, some in (
            ("home", [cell for cell in wanted if cell.victim != DATABASE]),
            ("with PostgreSQL", [cell for cell in wanted if cell.victim == DATABASE]),
        ):
            if some:
                broken += play_on_own_platform(folder / name, folder / "files", some, given.lanes)
        return 1 if broken else 0
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(folder)


if __name__ == "__main__":
    sys.exit(main())
