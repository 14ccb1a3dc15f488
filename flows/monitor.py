"""What serves is looked at again and again: rows and predictions against the training rows, the data's contract, and
quality as the labels come.

A look is written to the ledger before anything follows from it, under `monitor/MODEL`, with its evidence, so that it
can be decided again; what follows (events, figures, tags, a retraining, a rollback) is named by that entry, and what
could not be done is done by the next look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import flow

from flows.page import rows
from flows.policy import Found, find
from flows.publish import artifact_key
from flows.rollback import take_back
from flows.runner import Runner, in_prefect, whoami
from flows.settings import Settings
from flows.story import fold, is_way_back, policy_of, readable, reports_in
from flows.wiring import connect, connect_monitor
from policies import audit
from policies import monitor as rules_of
from policies.events import Phase
from policies.monitor import LOOKED, TOLD, Seen, Steps
from policies.policy import Monitor, Policy
from policies.verdict import GateReport, Verdict
from tasks import monitor as tasks
from tasks.ports import BadInput, Bundle, Entry, ModelVersion, NotThere, PortError, Ports, Refused
from tasks.ports_monitor import Chosen, MonitorPorts, Notice, Window
from tasks.registration import fetch
from tasks.validation import check_data

ALL_MODELS = "*"
_SETTLE_S = 3.0  # the servers write their samples every second
_DUE = 0.9  # of a period: a schedule is never quite on time
_LATE = 2.0  # periods after which what followed from a look is not done any more, if it acts on the traffic


@dataclass(frozen=True)
class Asked:
    """What to look at: one model, or every one that serves; by its own policy or another; `at_once`: due or not."""

    model: str | None = None
    policy: Found | None = None
    at_once: bool = False


class CouldNotLook(PortError):
    """Some model could not be looked at; `looks` holds what was said of all of them."""

    def __init__(self, looks: list[dict[str, Any]]) -> None:
        failed = [f"{look['model']}: {look['says']}" for look in looks if look["verdict"] == Verdict.ERROR]
        super().__init__("; ".join(failed))
        self.looks = looks


@dataclass(frozen=True)
class Subject:
    """What serves, since when, by which policy; `went_back`: it came (back) by a rollback."""

    model: str
    version: str
    since: float
    policy: Policy
    folder: Path
    went_back: bool = False

    @property
    def rules(self) -> Monitor:
        return self.policy.monitor


@flow(name="monitor", flow_run_name="monitor {model}", retries=0)
def monitor(model: str = ALL_MODELS, policy: str | None = None, at_once: bool = False) -> list[dict[str, Any]]:
    """Looks at the model, or at every model that is due; one dictionary per look.

    Args:
        model: Name of the registered model; `*` is every model that serves.
        policy: Another policy than the one that the serving version was delivered by: its name, a file's path on the
            worker's machine, or the YAML text.
        at_once: Look even if the period since the last look is not over.

    Raises CouldNotLook, after all others were looked at, where a source was down; NotThere for an unknown model.
    """
    found = find(Settings().shelf, policy) if policy else None
    asked = Asked(None if model == ALL_MODELS else model, found, at_once)
    looks = monitor_with(connect(), connect_monitor(), asked, in_prefect)
    if any(look["verdict"] == Verdict.ERROR for look in looks):
        raise CouldNotLook(looks)
    return looks


def monitor_with(ports: Ports, more: MonitorPorts, asked: Asked, run: Runner) -> list[dict[str, Any]]:
    """The looks, on the given ports."""
    models = [asked.model] if asked.model else sorted(ports.router.routes())
    looks = []
    for model in models:
        try:
            subject = subject_of(ports, model, asked.policy)
            if _catch_up(ports, more, subject, LOOKED, run):
                subject = subject_of(ports, model, asked.policy)  # another version may serve by now
            due = _period(ports, subject, asked.at_once)
            if due is not None:
                looks.append(_look(ports, more, subject, due, run))
            else:  # a look would ask anew for the way back that is owed, or find that the alarm is over
                _catch_up(ports, more, subject, TOLD, run)
        except Refused:
            looks.append(_nothing(model, Verdict.HOLD, "another look at the model came first"))
        except PortError as exc:
            if asked.model and isinstance(exc, (BadInput, NotThere)):
                raise
            verdict = Verdict.HOLD if isinstance(exc, NotThere) else Verdict.ERROR
            looks.append(_nothing(model, verdict, str(exc)))
    return looks


def _nothing(model: str, verdict: Verdict, says: str) -> dict[str, Any]:
    return {"model": model, "version": None, "verdict": str(verdict), "says": says, "reports": [], "standing": []}


def subject_of(ports: Ports, model: str, other: Found | None) -> Subject:
    """What serves the model now, to be looked at by the policy that it was delivered by, or by the `other`.

    Raises NotThere where nothing does, or where no policy is known for it.
    """
    route = ports.router.current(model)
    if route is None or route.stable is None:
        raise NotThere(f"no version of '{model}' serves")
    promotions = _promotions(ports, model, route.stable)
    newest = next(promotions, None)
    state = fold(newest or ())
    since, went_back = (state.since, is_way_back(newest)) if newest and state else (0.0, False)
    if other is not None:
        return Subject(model, route.stable, since, other.policy, other.folder, went_back)
    if newest is None:
        raise NotThere(f"v{route.stable} of '{model}' was not promoted here; say by which policy to look at it")
    # A rollback's request names no folder; that of the delivery before it does.
    requests = (entries[0].body.get("request") for entries in chain([newest], promotions))
    folder = next((each["policy_folder"] for each in requests if each), ".")
    return Subject(model, route.stable, since, policy_of(newest), Path(folder), went_back)


def _promotions(ports: Ports, model: str, version: str) -> Iterator[Sequence[Entry]]:
    """The entries of the rollouts that promoted the version, newest first."""
    for name in ports.ledger.rollouts(model):
        entries = ports.ledger.read(name)
        state = readable(entries)
        if state is not None and state.phase is Phase.PROMOTED and state.candidate == version:
            yield entries


def book(model: str) -> str:
    """The name under which the ledger keeps the looks at a model."""
    return f"monitor/{model}"


def _period(ports: Ports, subject: Subject, at_once: bool) -> tuple[float, float] | None:
    """The time to look at: from the last look's end, or one period; None if it is not due yet."""
    until, every = ports.clock.now() - _SETTLE_S, subject.rules.every
    before = _newest(ports, subject)
    last = before[0].body["seen"]["until"] if before is not None else until - every
    if at_once:
        return max(until - every, subject.since), until
    if before is not None and until - last < _DUE * every:
        return None
    since = last if until - last <= _LATE * every else until - every
    return max(since, subject.since), until


def _last(ports: Ports, model: str) -> tuple[Entry, Entry] | None:
    """The newest look at the model, and what was written last: that look, or what became of what followed from it."""
    found = ports.ledger.last(book(model), 3)  # that is written at most twice
    looks = [entry for entry in found if entry.kind == LOOKED]
    return (looks[-1], found[-1]) if looks else None


def _newest(ports: Ports, subject: Subject) -> tuple[Entry, Entry] | None:
    """As `_last`, if that look was at what serves now."""
    found = _last(ports, subject.model)
    return found if found is not None and _is_of(subject, found[0]) else None


def _is_of(subject: Subject, look: Entry) -> bool:
    """Whether it was a look at what serves now. A version may have left and come back, by a person's word."""
    return bool(look.body["seen"]["version"] == subject.version and look.at >= subject.since)


def _standing(ports: Ports, subject: Subject) -> tuple[set[str], set[str], bool]:
    """The alarms that stand; those of them whose beginning has not been acted on; whether a way back is owed to one.

    An alarm that stood before another version came stands on: it is not that one's doing. What should have acted on it
    is not owed to that one either.
    """
    found = _last(ports, subject.model)
    if found is None:
        return set(), set(), False
    look, last = found
    steps = look.body["steps"]
    if not _is_of(subject, look):
        gone = not subject.went_back and _was_taken_back(ports, look)
        return set() if gone else set(steps["standing"]), set(), False
    if last is look:
        return set(steps["standing"]), set(steps["began"]), steps["rollback"]
    return set(steps["standing"]), set(), last.body.get("owed", False)


def _was_taken_back(ports: Ports, look: Entry) -> bool:
    """Whether the version that was looked at has been taken back since: its alarms went with it."""
    seen = look.body["seen"]
    for name in ports.ledger.rollouts(seen["model"]):
        entries = ports.ledger.read(name)
        state = readable(entries)
        if state is None or not state.ended:
            continue
        if state.since < look.at:
            return False
        if state.phase is Phase.PROMOTED and entries[0].body.get("back_from") == seen["version"]:
            return True
    return False


# ---------------------------------------------------------------- a look


def _look(
    ports: Ports, more: MonitorPorts, subject: Subject, period: tuple[float, float], run: Runner
) -> dict[str, Any]:
    """One look: evidence, verdict, the ledger's entry, and what follows."""
    with TemporaryDirectory(prefix="lockgate-monitor-") as folder:
        seen, window = gather(ports, more, subject, period, Path(folder), run)
        reports = rules_of.judge(subject.rules, seen)
        standing, unacted, owed = _standing(ports, subject)
        steps = rules_of.steps(subject.rules, reports, standing, owed, subject.went_back, unacted)
        entry = _write(ports, subject, seen, reports, steps)
        pages = [] if window is None else _pages(more, subject, seen, window, bool(steps.standing), Path(folder), run)
        errors = _carry_out(ports, more, subject, entry, entry, pages, run)
    return {**_told(entry), "errors": errors}


def _told(entry: Entry) -> dict[str, Any]:
    """A look as it is told to people and machines."""
    body = entry.body
    named = ("verdict", "says", "reports")
    return {
        **{key: body["seen"][key] for key in ("model", "version", "since", "until", "rows")},
        **{key: body[key] for key in named},
        **{key: body["steps"][key] for key in ("standing", "began")},
    }


def gather(
    ports: Ports, more: MonitorPorts, subject: Subject, period: tuple[float, float], folder: Path, run: Runner
) -> tuple[Seen, Window | None]:
    """The evidence. What could not be read is a problem, what is not there yet is lacking; neither is raised."""
    seen = Seen(subject.model, subject.version, *period)
    rules, chosen = subject.rules, _chosen(subject.policy)
    version: ModelVersion | None = None
    window: Window | None = None
    with _noted(seen, "rows"):
        version = ports.registry.version(subject.model, subject.version)
        bundle: Bundle = run(fetch, ports.registry, version, name=f"fetch v{version.version}")
        window = run(tasks.write_window, more.windows, version, bundle, chosen, *period, folder, name="live rows")
    if window is not None:
        seen = replace(seen, rows=window.live_rows, reference=window.reference_name)
        metric = rules.quality.metric if rules.quality else "brier"
        seen = replace(seen, estimate=rules_of.estimate(metric, window.predictions, window.known))
        with _noted(seen, "drift"):
            seen = replace(seen, groups=_groups(more, rules, window, seen, run))
        with _noted(seen, "data"):
            if rules.data is not None:
                suite = subject.folder / rules.data
                seen = replace(seen, data=run(check_data, ports.contract, suite, window.live, name="check data"))
    with _noted(seen, "labels"):
        if rules.quality is not None and version is not None and window is not None:
            gate = rules.quality
            live, unlabelled = run(
                tasks.labelled, more.windows, version, gate.metric, *period, gate.wait, name="labels"
            )
            known = more.windows.known_losses(window, gate.metric)
            seen = replace(seen, live=live, validation=known, unlabelled=unlabelled)
    return seen, window


@contextmanager
def _noted(seen: Seen, source: str) -> Iterator[None]:
    """An error of the source is written down in the evidence, and the look goes on."""
    try:
        yield
    except PortError as exc:
        where = seen.lacking if isinstance(exc, NotThere) else seen.problems
        where[source] = str(exc)


def _chosen(policy: Policy) -> Chosen:
    return Chosen(policy.prediction.output, policy.prediction.column, policy.checks.label)


def _groups(more: MonitorPorts, rules: Monitor, window: Window, seen: Seen, run: Runner) -> tuple[Any, ...]:
    """The comparisons: the predictions, the inputs that are numbers, and those that are text. One that cannot be made
    is written down under its own name: it takes none of the others with it.
    """
    gate = rules.drift
    if gate is None:
        return ()
    known = {*window.numbers, *window.texts}
    unknown = sorted(set(gate.columns) - known)
    if unknown:
        raise BadInput(f"monitor.drift.columns names '{unknown[0]}'; the inputs are {', '.join(sorted(known))}")
    wanted = gate.columns or known
    plan = (
        ("predictions", ("prediction",), gate.method),
        ("inputs", tuple(name for name in window.numbers if name in wanted), gate.method),
        ("categories", tuple(name for name in window.texts if name in wanted), "jensenshannon"),
    )
    needed = rules_of.permutations(rules)
    found = []
    for name, columns, method in plan:
        if columns:
            with _noted(seen, name):
                compared = run(
                    tasks.compare, more.comparer, window, name, columns, method, needed, name=f"compare {name}"
                )
                found.append(compared)
    return tuple(found)


# ---------------------------------------------------------------- what follows


def _write(ports: Ports, subject: Subject, seen: Seen, reports: Sequence[GateReport], steps: Steps) -> Entry:
    """The look on the ledger. Raises Refused where another look at the model came first."""
    body = {
        "rules": subject.rules.model_dump(mode="json"),
        "policy_digest": subject.policy.digest,
        "seen": rules_of.to_body(seen),
        "reports": [asdict(report) for report in reports],
        "verdict": rules_of.verdict_of(reports),
        "says": rules_of.summary(reports),
        "steps": asdict(steps),
    }
    name = book(subject.model)
    last = ports.ledger.last(name, 1)
    sequence = last[-1].sequence + 1 if last else 1
    return ports.ledger.append(name, sequence, ports.clock.now(), whoami(), LOOKED, audit.clean(body))


def _pages(
    more: MonitorPorts, subject: Subject, seen: Seen, window: Window, alarm: bool, folder: Path, run: Runner
) -> list[Path]:
    """The detector's report: the newest one, and one of its own for each period with an alarm."""
    stamp = datetime.fromtimestamp(seen.until, UTC).strftime("-%Y%m%dT%H%M%S") if alarm else "-newest"
    page = folder / f"monitor{stamp}.html"
    try:
        return [run(tasks.snapshot, more.comparer, subject.model, seen.until, window, page, name="snapshot")]
    except PortError:
        return []  # a report that could not be made changes no verdict


def _catch_up(ports: Ports, more: MonitorPorts, subject: Subject, kind: str, run: Runner) -> bool:
    """Does now what the last look could not do, where the newest entry is of that kind; whether there was anything."""
    found = _last(ports, subject.model)
    if found is None or found[1].kind != kind or not found[1].body.get("owed", kind == LOOKED):
        return False
    _carry_out(ports, more, subject, *found, [], run)
    return True


def _take_back(ports: Ports, model: str, version: str, reason: str, run: Runner) -> None:
    """Brings the former version back. Raises Refused where it was decided otherwise, PortError if it may work later."""
    _, state = take_back(ports, model, reason, whoami(), lambda _: None, run, only=version)
    if state.phase is not Phase.PROMOTED:
        said = f"v{version} is not taken back: {state.reason}"
        again = state.unfinished and state.phase is not Phase.HALTED  # what has halted is a person's
        raise PortError(said) if again else Refused(said)


def _carry_out(
    ports: Ports, more: MonitorPorts, subject: Subject, entry: Entry, last: Entry, pages: list[Path], run: Runner
) -> dict[str, str]:
    """Everything that follows from the look; returns what could not be done. What may work later is left to the next
    look, everything again: each part is done once however often it is tried. Only the way back, which a rollout may
    keep waiting for days, is owed by itself: `last` is the look, or says that the rest was done.
    What should have acted, and is too late for it, is not said to be done: the next look begins the alarm anew.
    """
    body = entry.body
    key, model, version = f"{book(subject.model)}:{entry.number}", subject.model, body["seen"]["version"]
    payload = {**{name: body[name] for name in ("verdict", "says")}, **body["steps"], "entry": entry.number}
    late = ports.clock.now() - entry.at > _LATE * subject.rules.every
    anew = late and _is_of(subject, entry) and (body["steps"]["rollback"] or body["steps"]["retrain"])
    began = [] if anew else body["steps"]["began"]
    events = ["looked", *began, *(f"{kind}.ended" for kind in body["steps"]["ended"])]

    def keep_it() -> None:
        seen, reports = rules_of.seen_from(body["seen"]), reports_in(body)
        at = datetime.fromtimestamp(seen.until, UTC).isoformat(timespec="seconds")
        tags = {"verdict": body["verdict"], "says": body["says"][:4000], "at": at}
        named = {f"lockgate.monitor.{name}": value for name, value in tags.items()}
        figures = rules_of.metrics(seen, reports)
        kept = ports.registry.version(model, version)
        run(tasks.keep, ports.registry, kept, figures, named, pages, name="keep")
        said = f"{model} v{version}: **{body['verdict']}**: {body['says']}"
        run(tasks.show, artifact_key(model, "monitor"), said, rows(reports), name="show")

    def retrain() -> None:
        asked = body["rules"]["retrain"]
        run(
            tasks.start, more.herald, key, asked["deployment"], asked["parameters"], name=f"start {asked['deployment']}"
        )

    def notice(name: str) -> Notice:
        return Notice(key, f"lockgate.monitor.{name}", model, version, entry.at, payload)

    jobs: dict[str, Callable[[], object]] = {
        name: partial(run, tasks.tell, more.herald, notice(name), name=name) for name in events
    }
    fresh = _is_of(subject, entry) and not late
    if fresh and body["steps"]["rollback"]:
        reason = f"monitor: {body['says']}"
        jobs = {"rollback": partial(_take_back, ports, model, version, reason, run), **jobs}
    if fresh and body["steps"]["retrain"]:
        jobs["retrain"] = retrain
    jobs["keep"] = keep_it
    if last is not entry:
        jobs = {name: job for name, job in jobs.items() if name == "rollback"}
    errors, later = _try_all(jobs)
    owed = later.keys() == {"rollback"}
    if jobs and not anew and (not later or (owed and last is entry)):
        _write_told(ports, entry, last, {"errors": errors | later, "owed": owed})
    return errors | later


def _write_told(ports: Ports, look: Entry, last: Entry, body: dict[str, Any]) -> None:
    """What became of what followed from the look. Another pass may have said so first, and a way back that it found
    under way it calls owed: where this one has seen how that ended, that is the last word."""
    try:
        ports.ledger.append(look.rollout, last.sequence + 1, ports.clock.now(), whoami(), TOLD, audit.clean(body))
    except Refused:
        (found,) = ports.ledger.last(look.rollout, 1)
        if found.kind == TOLD and found.sequence == look.sequence + 1 and found.body.get("owed") and not body["owed"]:
            _write_told(ports, look, found, body)


def _try_all(jobs: Mapping[str, Callable[[], object]]) -> tuple[dict[str, str], dict[str, str]]:
    """What cannot be done at all, and what may be done later, by name, with why."""
    errors: dict[str, str] = {}
    later: dict[str, str] = {}
    for name, job in jobs.items():
        try:
            job()
        except (BadInput, NotThere, Refused) as exc:
            errors[name] = str(exc)
        except PortError as exc:
            later[name] = str(exc)
    return errors, later
