"""The record, for those who have to trust it: verified, exported, recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.story import evidence_of, policy_of, reports_in
from policies import audit, gates, monitor
from policies.audit import Head, Verified
from policies.policy import Monitor
from policies.verdict import worst
from tasks.ports import BadInput, Entry, Ledger


@dataclass(frozen=True)
class Difference:
    """A decision that comes out otherwise when it is computed again: what is written, and what it should be."""

    number: int
    at: float
    written: str
    recomputed: str


def replay(entries: Sequence[Entry]) -> tuple[int, list[Difference]]:
    """Every look decided again on its recorded evidence, by the recorded policy: how many, and what differs.

    Raises BadInput for a rollout without entries.
    """
    if not entries:
        raise BadInput("the ledger has no such rollout")
    if entries[0].kind == monitor.LOOKED:
        return _replay_monitor(entries)
    policy = policy_of(entries)
    state = gates.begin(policy)
    looks, found = 0, []
    for entry in entries:
        evidence = evidence_of(entry)
        if evidence is None:
            continue
        looks += 1
        state, reports = gates.look(policy, int(entry.body["stage"]), state, evidence)
        recorded = reports_in(entry.body)
        if gates.NONE_ASKED not in gates.verdicts(recorded):  # before that was reported, traffic as meant was enough
            reports = tuple(report for report in reports if report.gate != gates.NONE_ASKED)
        verdict = worst(report.verdict for report in reports)
        if (str(verdict), reports) != (entry.body["verdict"], recorded):
            told = gates.summary(reports)
            found.append(Difference(entry.number, entry.at, f"{entry.body['verdict']}: {entry.body['says']}", told))
    return looks, found


def _replay_monitor(entries: Sequence[Entry]) -> tuple[int, list[Difference]]:
    """The looks at what serves, each by the rules that stood then."""
    looks = [entry for entry in entries if entry.kind == monitor.LOOKED]
    found = []
    for entry in looks:
        reports = monitor.judge(Monitor.model_validate(entry.body["rules"]), monitor.seen_from(entry.body["seen"]))
        verdict = str(monitor.verdict_of(reports))
        if (verdict, reports) != (entry.body["verdict"], reports_in(entry.body)):
            written = f"{entry.body['verdict']}: {entry.body['says']}"
            found.append(Difference(entry.number, entry.at, written, f"{verdict}: {monitor.summary(reports)}"))
    return len(looks), found


def verified(ledger: Ledger, file: Path | None, key: bytes | None, known: Head | None = None) -> Verified:
    """The ledger itself, held against its own chain, the head that it has now, and one that it had earlier; or a file
    that was exported from it, held against the head at its end, and that one's signature.

    What is written to the ledger meanwhile is read, too.
    """
    if file is None:
        return audit.verify(ledger.lines(), known=[ledger.head(), *([known] if known else [])])
    try:
        with file.open("rb") as lines:
            return audit.verify_export(lines, key)
    except OSError as exc:
        raise BadInput(f"{file} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadInput(str(exc)) from exc


def exported(ledger: Ledger, key: bytes | None) -> Iterator[bytes]:
    """The ledger as JSON Lines, with its head at the end. Raises BadInput at the first entry that does not fit."""
    try:
        yield from audit.export(ledger.lines(), key)
    except ValueError as exc:
        raise BadInput(str(exc)) from exc


def as_document(seen: Verified) -> dict[str, Any]:
    """For `--json`."""
    return {"sound": seen.breach is None, **asdict(seen)}
