"""The checks before any traffic, in order: what is cheap and refuses most comes first.

Bad input is told before anything is registered. The rest runs on copies of the candidate and of the champion in real
model servers of their own (trials), beside the live ones, which notice nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flows.runner import Runner
from policies import speed
from policies.policy import Policy
from policies.rollout import Rollout
from policies.verdict import GateReport, Verdict, worst
from tasks.benchmark import race
from tasks.deployment import deploy, deployment, undeploy
from tasks.ports import BadInput, Bundle, Endpoint, ModelVersion, NotThere, Ports, Submission
from tasks.registration import fetch
from tasks.validation import Material, check_answers, check_data, signature_report, validation_rows


@dataclass(frozen=True)
class Preparation:
    """A submission whose files were looked at, and the suite that its data must meet."""

    submission: Submission
    suite: Path | None


def prepare(ports: Ports, policy: Policy, submission: Submission, folder: Path) -> Preparation:
    """Looks at everything that can be looked at without changing anything. Raises BadInput."""
    suite = folder / policy.checks.data if policy.checks.data else None
    if suite is not None and not suite.is_file():
        raise BadInput(f"the policy's expectations {suite} do not exist")
    rows = validation_rows(policy, folder, submission.validation)
    submission = replace(submission, validation=rows)
    if rows is not None:
        ports.rows.label(rows, policy.checks.label)
        for column in policy.checks.slices:
            ports.rows.groups(rows, column)
    if not submission.source.startswith(("models:/", "runs:/")):
        _look_at_file(ports, policy, submission)
    return Preparation(submission, suite)


def _look_at_file(ports: Ports, policy: Policy, submission: Submission) -> None:
    signature = ports.inspector.signature(Path(submission.source))
    if submission.validation is not None:
        ports.rows.fits(submission.validation, signature, policy.checks.label)
    champion = champion_of(ports, submission.model)
    report = signature_report(signature, champion.signature if champion else None)
    if report.verdict is not Verdict.PASS:
        raise BadInput(f"{submission.source} has another signature than {submission.model}'s champion: {report.says}")


def champion_of(ports: Ports, model: str) -> ModelVersion | None:
    """The registry's champion; None for a model that the registry does not know."""
    try:
        return ports.registry.by_alias(model, "champion")
    except NotThere:
        return None


def run_checks(
    ports: Ports, policy: Policy, state: Rollout, preparation: Preparation, run: Runner
) -> Sequence[GateReport]:
    """All reports. The first kind of check that fails ends it: what is broken is not benchmarked."""
    candidate = replace(ports.registry.version(state.model, state.candidate), signed=state.signed)
    champion = ports.registry.version(state.model, state.stable) if state.stable else None
    bundle: Bundle = run(fetch, ports.registry, candidate, name=f"fetch v{candidate.version}")
    reports = [signature_report(candidate.signature, champion.signature if champion else None)]
    rows = bundle.validation or preparation.submission.validation
    if preparation.suite is not None:
        if rows is None:
            says = "the policy names expectations, but there are no validation rows to check"
            reports.append(GateReport("data", Verdict.HOLD, says, needs="validation rows"))
        else:
            reports.append(run(check_data, ports.contract, preparation.suite, rows, name="check data"))
    if worst(report.verdict for report in reports) is Verdict.PASS:
        material = Material(rows, bundle.expected, first=champion is None)
        reports += _on_trial(ports, policy, candidate, champion, bundle, material, run)
    return reports


def _on_trial(
    ports: Ports,
    policy: Policy,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    bundle: Bundle,
    material: Material,
    run: Runner,
) -> list[GateReport]:
    """Answers and speed, in servers that are gone again when this returns."""
    started: list[ModelVersion] = []
    try:
        endpoints: list[Endpoint] = []
        load_s: list[float] = []
        for version in (candidate, champion):
            if version is not None:
                onnx = bundle.onnx if version is candidate else _bytes_of(ports, version, run)
                signed = version.signed if version is candidate else ""
                wanted = deployment(policy, version.model, version.version, version.digest, onnx, True, signed)
                started.append(version)
                began = ports.clock.now()
                endpoints.append(run(deploy, ports.target, wanted, True, name=f"try v{version.version}")[0])
                load_s.append(ports.clock.now() - began)
        ours, theirs = endpoints[0], endpoints[1] if champion else None
        name = f"check answers of v{candidate.version}"
        reports: list[GateReport] = run(
            check_answers, ports.probe, ports.rows, policy, ours, theirs, material, name=name
        )
        if worst(report.verdict for report in reports) is Verdict.PASS:
            reports += _benchmark(ports, policy, candidate, endpoints, load_s, material, run)
        return reports
    finally:
        for version in started:
            run(undeploy, ports.target, version.model, version.version, True, name=f"end trial of v{version.version}")


def _benchmark(
    ports: Ports,
    policy: Policy,
    candidate: ModelVersion,
    endpoints: list[Endpoint],
    load_s: list[float],
    material: Material,
    run: Runner,
) -> list[GateReport]:
    rows, rules = material.validation, policy.benchmark
    assert rows is not None  # without validation rows the quality gate has not passed
    name = f"benchmark v{candidate.version}"
    raced = run(race, ports.probe, endpoints, rows, policy.checks.label, rules.duration, name=name)
    # Where the server does not say how long it took to load, it is what the target took to have it ready.
    seen = [replace(one, load_s=one.load_s or took) for one, took in zip(raced, load_s, strict=True)]
    ports.registry.record(candidate, {f"benchmark.{key}": value for key, value in speed.figures(seen[0]).items()})
    return list(speed.benchmark(rules, seen[0], seen[1] if len(seen) > 1 else None))


def _bytes_of(ports: Ports, version: ModelVersion, run: Runner) -> Path:
    stored = ports.target.stored(version.digest)
    if stored is not None:
        return stored
    bundle: Bundle = run(fetch, ports.registry, version, name=f"fetch v{version.version}")
    return bundle.onnx
