"""Whatever happened, the next pass converges: rollouts that nobody drives go on, and what is left over is mended.

Level-triggered: a pass looks at the ledger and at the world, never at what woke it, so one that was missed costs
nothing but time, and two at once do no harm. Scheduled, and run when the platform starts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import InitVar, asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from prefect import flow

from flows.checks import Preparation, run_checks
from flows.delivery import Delivery, request_submission
from flows.form import PrefectForms
from flows.leftovers import mend
from flows.orders import abort, over
from flows.publish import showing
from flows.relay import Relay
from flows.rollback import proven_before
from flows.rollout import Checks, Controller, Superseded, Watched, unwatched
from flows.runner import Runner, directly, in_prefect, is_dead, whoami
from flows.runs import cancelled, look_at_registry
from flows.settings import Settings
from flows.story import Unreadable, fold, is_way_back, policy_of, run_of, state_of, target_of
from flows.wiring import connect, herald, links
from policies.events import Phase
from policies.policy import Policy
from policies.rollout import Rollout, due
from serving.log import say
from tasks.ports import Entry, PortError, Ports

_LOOKS = 3.0  # so many looks without an entry, beyond the lease, and a rollout has no controller any more
_EVERY_S = 5.0
_WORKERS = 16  # models mended at once by one pass

ChecksOf = Callable[[Sequence[Entry]], Checks]
Jobs = Sequence[Callable[[], None]]
Drive = Callable[[Mapping[str, Callable[[], None]]], None]  # runs the job that drives a rollout, by the rollout's name
Cancelled = Callable[[Collection[str]], Collection[str]]  # of flow runs, by id, those that somebody has cancelled


@dataclass
class Pass:
    """What one pass did: how the rollouts that it took over ended, what it mended and started, what it leaves.

    Each is said at once, too: a rollout may be driven for days.
    """

    driven: dict[str, str] = field(default_factory=dict)
    mended: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    say: InitVar[Callable[[str], None]] = lambda _line: None

    def __post_init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def drove(self, rollout: str, label: str) -> None:
        """The rollout has been driven to here."""
        self.driven[rollout] = label
        self._say(f"{rollout}: {label}")

    def mend(self, what: str) -> None:
        """It was amiss, and is mended."""
        self.mended.append(what)
        self._say(what)

    def leave(self, what: str, why: str) -> None:
        """It could not be done now; the next pass finds it again."""
        self.left[what] = why
        self._say(f"left for the next pass: {what}: {why}")


class Drivers:
    """A thread for each rollout that is driven: a pass begins them and waits for none, as a rollout may take days."""

    def __init__(self) -> None:
        self._threads: dict[str, Thread] = {}
        self._errors: list[BaseException] = []

    def __call__(self, jobs: Mapping[str, Callable[[], None]]) -> None:
        """Begins the jobs, by rollout, but for rollouts that are still driven here."""
        self._threads = {name: thread for name, thread in self._threads.items() if thread.is_alive()}
        for name, job in jobs.items():
            if name not in self._threads:
                self._threads[name] = Thread(
                    target=copy_context().run, args=[self._run, job], name=f"drive {name}", daemon=True
                )
                self._threads[name].start()

    def wait(self) -> None:
        """Until all have ended; raises what a job has raised."""
        for thread in self._threads.values():
            thread.join()
        for error in self._errors:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as exc:
            self._errors = [exc]
            raise  # a thread's traceback is in the process's log


@flow(name="reconcile", flow_run_name="reconcile", retries=0)
def reconcile(at_once: bool = False, crashed: str | None = None) -> dict[str, Any]:
    """One pass over the platform.

    Args:
        at_once: Take over every unsettled rollout, also one that somebody drives.
        crashed: The id of a flow run that has crashed: its rollout is taken over at once, if nobody has done so yet.

    Returns a `Pass` as a dictionary. Raises PortError if the ledger cannot be reached.
    """
    ports, drivers = connect(), Drivers()
    try:
        done = _pass(ports, in_prefect, at_once, drivers, crashed=crashed)
        try:
            asked = look_at_registry(Settings())
            done.started = asked.started
            done.left.update(asked.left)
        except PortError as exc:
            done.leave("registry", str(exc))
        try:
            Relay(ports.ledger, herald(ports.ledger), PrefectForms()).pass_on()
        except (PortError, ValueError) as exc:  # the latter: a ledger that does not fit, which `audit verify` tells
            done.leave("events and forms", str(exc))
    finally:
        drivers.wait()  # the end of this process would be theirs
    return asdict(done)


def keep_reconciling(every_s: float = _EVERY_S) -> NoReturn:
    """One pass after the other, from when the platform is up; prints what each did, and what it had to leave."""
    at_once, drivers = True, Drivers()
    while True:
        try:
            _pass(connect(), directly, at_once, drivers, say=say)
            at_once = False
        except Exception as exc:  # noqa: BLE001 - the rollouts that it drives would end with it
            say(f"nothing could be done: {type(exc).__name__}: {exc}")
        time.sleep(every_s)


def _pass(ports: Ports, run: Runner, at_once: bool, drivers: Drivers, **more: Any) -> Pass:
    checks_of, watched = partial(_checks, ports, run), partial(showing, ports.ledger, links)
    return reconcile_with(
        ports, whoami(), run, checks_of, at_once, drivers, watched=watched, cancelled=cancelled, **more
    )


def side_by_side(jobs: Jobs) -> None:
    """Each job in a thread of its own, within this flow's run: none waits for another."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        for running in [pool.submit(copy_context().run, job) for job in jobs]:
            running.result()


def reconcile_with(
    ports: Ports,
    who: str,
    run: Runner,
    checks_of: ChecksOf,
    at_once: bool,
    drive: Drive,
    all_of: Callable[[Jobs], None] = side_by_side,
    watched: Watched = unwatched,
    cancelled: Cancelled = lambda _runs: (),
    crashed: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Pass:
    """One pass, on the given ports. What cannot be done now is named in `left`, and stands in nobody's way."""
    done = Pass(say=say)
    going_back = []
    for name in ports.ledger.unsettled():
        try:
            if state_of(ports.ledger, name).phase is Phase.ROLLING_BACK:
                going_back.append(name)
        except Unreadable as exc:
            done.leave(name, str(exc))

    def go_on(name: str, entries: Sequence[Entry]) -> None:
        me = f"{who}/{uuid.uuid4().hex[:6]}"
        with watched(name) as observe:
            _go_on(Controller(ports, name, me, run, checks_of(entries), observe), entries, done)

    def take_over(names: Collection[str], given_up: Collection[str] = ()) -> None:
        jobs: dict[str, Callable[[], None]] = {}
        for name in names:
            entries = ports.ledger.read(name)
            now = ports.clock.now()
            try:
                left = at_once or _left_by(crashed, entries) or _abandoned(entries, now)
                wanted = name in given_up or (left and not _only_waits(entries, now))
            except Unreadable as exc:  # its policy
                done.leave(name, str(exc))
                continue
            if wanted:
                jobs[name] = _job(done, name, partial(go_on, name, entries))
        drive(jobs)

    take_over(going_back)  # first: a way back waits for no word from Prefect
    given_up = _obey(ports, who, cancelled, done)
    # Whose order to go back could not be written is not driven on before it is.
    take_over([name for name in ports.ledger.unsettled() if name not in (*going_back, *done.left)], given_up)
    try:
        models = sorted(ports.router.routes())
    except PortError as exc:
        done.leave("routes", str(exc))
        return done
    all_of([_job(done, model, partial(mend, ports, model, who, run, done.mend)) for model in models])
    return done


def _job(done: Pass, what: str, work: Callable[[], None]) -> Callable[[], None]:
    """The work, where an error is one line of the pass: the rest goes on."""

    def job() -> None:
        try:
            work()
        except (PortError, ValueError) as exc:
            done.leave(what, str(exc))

    return job


def _obey(ports: Ports, who: str, cancelled: Cancelled, done: Pass) -> set[str]:
    """Whoever cancels a delivery's flow run wants its rollout back, whether its process heard of it or was killed.

    The rollouts that are to go back from now on: their processes are being killed, so that nobody else carries it out.
    """
    of_run = {}
    for name in (each for each in ports.ledger.unsettled() if each not in done.left):
        run = ports.ledger.read(name)[0].body.get("flow_run")
        if run is not None:
            of_run[run] = name
    try:
        stopped = cancelled(of_run.keys())
    except PortError as exc:
        done.leave("cancelled flow runs", str(exc))
        return set()
    states = {of_run[run]: state_of(ports.ledger, of_run[run]) for run in stopped}
    new = {name for name, state in states.items() if not state.ended and state.phase is not Phase.ROLLING_BACK}
    for name in new:
        _job(done, name, partial(abort, ports, name, who, "its flow run was cancelled"))()
    return new


def _abandoned(entries: Sequence[Entry], now: float) -> bool:
    """Whether its controller is known to be dead, or nobody has written for so long that nobody drives it.

    Taking over one that is driven does no harm.
    """
    state, policy = fold(entries), policy_of(entries)
    assert state is not None
    if is_dead(state.holder):
        return True
    quiet = now - entries[-1].at
    rules = policy.rollout
    allowed = rules.lease + _LOOKS * rules.look_every
    if state.phase is Phase.PENDING and state.holder:
        allowed += state.terms.check_s / 2  # checks take their time, and nothing is at stake meanwhile
    return not 0.0 <= quiet <= allowed


def _left_by(run: str | None, entries: Sequence[Entry]) -> bool:
    """Whether it is the rollout of the flow run, which has crashed, and nobody has taken it over since."""
    return run is not None and run_of(entries) == run and sum(entry.kind == "taken" for entry in entries) <= 1


def _only_waits(entries: Sequence[Entry], now: float) -> bool:
    """Whether it waits for people, or for a freeze to end, before anything is live: nobody need drive it until then."""
    state = fold(entries)
    assert state is not None
    limit = due(state)
    waits = state.phase is Phase.PENDING and (state.question is not None or state.frozen is not None)
    return waits and limit is not None and now < limit


def _go_on(controller: Controller, entries: Sequence[Entry], done: Pass) -> None:
    """Drives the rollout on if it is its model's active one; else it goes back. Its end frees the model."""
    ports, name, state, target = controller.ports, controller.rollout, fold(entries), target_of(entries)
    assert state is not None
    if not over(state) and not _holds(ports, name, state.model, target):
        abort(ports, name, controller.who, "another rollout of the model is the active one")
    try:
        state = controller.drive()
    except Superseded as exc:
        done.leave(name, str(exc))
        return
    if over(state):
        ports.ledger.release(state.model, target, name)
    done.drove(name, state.label)


def _holds(ports: Ports, name: str, model: str, target: str) -> bool:
    """Whether the rollout has the claim on its model, taken anew if nobody has it."""
    holder = ports.ledger.claim(model, target, name)
    if holder == name:
        return True
    state = fold(ports.ledger.read(holder))
    if state is not None and over(state):
        ports.ledger.release(model, target, holder)
        return ports.ledger.claim(model, target, name) == name
    return False


def _checks(ports: Ports, run: Runner, entries: Sequence[Entry]) -> Checks:
    """The rollout's checks, from what its request says."""
    if is_way_back(entries):
        return proven_before
    policy = policy_of(entries)
    request = Delivery.model_validate({"policy": policy.name, **entries[0].body["request"]})
    suite = Path(request.policy_folder) / policy.checks.data if policy.checks.data else None
    preparation = Preparation(request_submission(request), suite)

    def checks(state: Rollout, policy: Policy) -> Any:
        return run_checks(ports, policy, state, preparation, run)

    return checks
