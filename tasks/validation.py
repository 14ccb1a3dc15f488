"""Is the version what it should be? Asked of the file, the data and the real model server, before any traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from policies import quality
from policies.policy import Policy
from policies.verdict import GateReport, Verdict
from tasks.ports import BadInput, DataContract, Endpoint, Probe, Rows, Signature, Tensor

_ROWS_MAX = 20_000
_PARITY_ROWS = 1_000


@dataclass(frozen=True)
class Material:
    """What the answers are checked on: labelled rows, and rows with the training framework's own predictions."""

    validation: Path | None
    expected: Path | None
    first: bool  # no champion can be there to compare with


def signature_report(candidate: Signature, champion: Signature | None) -> GateReport:
    """Pass if whoever calls the champion can call the candidate, and understands its answers."""
    if champion is None:
        return GateReport("signature", Verdict.PASS, "a sound ONNX model; there is no champion to agree with")
    breaches = [
        *_breaches("input", candidate.inputs, champion.inputs),
        *_breaches("output", candidate.outputs, champion.outputs),
    ]
    if breaches:
        return GateReport("signature", Verdict.FAIL, "; ".join(breaches))
    return GateReport("signature", Verdict.PASS, "the same inputs and outputs as the champion's")


def _breaches(what: str, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[str]:
    ours = {tensor.name: tensor for tensor in mine}
    wanted = {tensor.name: tensor for tensor in theirs}
    lines = [f"{what} '{name}' of the champion is missing" for name in wanted if name not in ours]
    lines += [f"{what} '{name}' is new: callers do not know it" for name in ours if name not in wanted]
    for name in ours.keys() & wanted.keys():
        if ours[name].dtype != wanted[name].dtype or not _same_shape(ours[name].shape, wanted[name].shape):
            lines.append(
                f"{what} '{name}' is {ours[name].dtype}{list(ours[name].shape)},"
                f" the champion's is {wanted[name].dtype}{list(wanted[name].shape)}"
            )
    return lines


def _same_shape(mine: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether a tensor of their shape fits mine: a free axis (-1) of mine takes any length."""
    return len(mine) == len(theirs) and all(a in (-1, b) for a, b in zip(mine, theirs, strict=True))


@task(name="check data", retries=1, retry_delay_seconds=2, timeout_seconds=600, cache_policy=NO_CACHE)
def check_data(contract: DataContract, suite: Path, rows: Path) -> GateReport:
    """The validation rows against the policy's expectations."""
    seen = contract.check(suite, rows)
    if seen.evaluated == 0 or seen.rows == 0:
        return GateReport("data", Verdict.HOLD, f"{seen.evaluated} expectations on {seen.rows} rows say nothing")
    if seen.breaches:
        told = "; ".join(
            f"{breach.expectation}{f' on {breach.column}' if breach.column else ''}: {breach.seen}"
            for breach in seen.breaches[:5]
        )
        more = f" and {len(seen.breaches) - 5} more" if len(seen.breaches) > 5 else ""
        return GateReport("data", Verdict.FAIL, f"{told}{more}", n=seen.rows)
    return GateReport("data", Verdict.PASS, f"all {seen.evaluated} expectations hold on {seen.rows} rows", n=seen.rows)


@task(name="check answers", retries=1, retry_delay_seconds=2, timeout_seconds=900, cache_policy=NO_CACHE)
def check_answers(
    probe: Probe, rows: Rows, policy: Policy, candidate: Endpoint, champion: Endpoint | None, material: Material
) -> list[GateReport]:
    """Parity with the training framework, and quality against the champion: on the same rows, in the real server."""
    reports = []
    if material.expected is not None:
        seen = probe.ask(candidate, material.expected, None, _PARITY_ROWS)
        expected = rows.prediction(material.expected)[: len(seen.predictions)]
        reports.append(quality.parity(expected, seen.predictions, policy.checks.parity_tolerance))
    if material.validation is None:
        says = "no labelled rows came with the version, and the policy names none (validate: rows)"
        return [*reports, GateReport("quality", Verdict.HOLD, says, needs="validation rows")]
    return [*reports, *_quality(probe, rows, policy, candidate, champion, material)]


def _quality(
    probe: Probe, rows: Rows, policy: Policy, candidate: Endpoint, champion: Endpoint | None, material: Material
) -> list[GateReport]:
    checks, path = policy.checks, material.validation
    assert path is not None
    truth = rows.label(path, checks.label)[:_ROWS_MAX]
    mine = probe.ask(candidate, path, checks.label, _ROWS_MAX)
    theirs = probe.ask(champion, path, checks.label, _ROWS_MAX).predictions if champion else None
    failed = len(mine.failures)
    answered = GateReport(
        "servable",
        Verdict.FAIL if failed else Verdict.PASS,
        f"{failed} of {len(mine.predictions)} rows failed: {mine.failures[0]}" if failed else "every row was answered",
        n=len(mine.predictions),
    )
    overall = quality.quality(checks.quality, truth, mine.predictions, theirs, first=material.first)
    groups = {name: rows.groups(path, name)[:_ROWS_MAX] for name in checks.slices}
    judged, told = quality.by_slice(checks, truth, mine.predictions, theirs, groups) if groups else ((), ())
    return [answered, overall, *judged, *(_only_told(report) for report in told)]


def _only_told(report: GateReport) -> GateReport:
    """A slice that is too small to judge is shown, and decides nothing."""
    return GateReport(report.gate, Verdict.PASS, f"not judged: {report.says}", n=report.n, unit=report.unit)


def validation_rows(policy: Policy, folder: Path, given: Path | None) -> Path | None:
    """The labelled rows: those that came with the version, else the policy's. Raises BadInput for a missing file."""
    named = folder / policy.checks.rows if policy.checks.rows else None
    path = given or named
    if path is not None and not path.is_file():
        raise BadInput(f"validation rows {path} do not exist")
    return path
