"""A policy in sentences, defaults included: what it will do, for the person who has to trust it."""

from __future__ import annotations

from collections.abc import Sequence

from policies.audience import Audience
from policies.policy import Approvals, Benchmark, Freeze, Gates, Monitor, Policy, RolloutPolicy


def duration(seconds: float) -> str:
    """Seconds as people write them: 90 s, 5 min, 2 h."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def explain(policy: Policy) -> list[str]:
    """One line per rule, in the order in which a version meets them."""
    target = policy.target
    whom = f"model {policy.model}" if policy.model else "any model"
    replicas = f"{target.replicas} replica{'s' if target.replicas > 1 else ''}"
    return [
        f"Policy {policy.name}, for {whom}, on target {target.kind} ({target.hardware}, {replicas}).",
        _trigger(policy),
        "",
        "Before any traffic:",
        *(f"  - {line}" for line in (*_checks(policy), *_benchmark(policy.benchmark))),
        "",
        "On live traffic:",
        *(f"  {number}. {line}" for number, line in enumerate(_stages(policy.rollout), 1)),
        *(f"  - {line}" for line in (*_audience(policy.rollout.audience), *_timeout(policy.rollout.timeout))),
        "",
        "At every look:",
        *(f"  - {line}" for line in (*_gates(policy.rollout.gates), *_limits(policy.rollout))),
        "",
        "Once it serves:",
        *(f"  - {line}" for line in _monitor(policy.monitor)),
        *_approvals(policy.governance.approvals),
        *freezes(policy.governance.freeze),
    ]


def freezes(windows: Sequence[Freeze]) -> list[str]:
    """When nothing new is let on."""
    told = [f"  - From {each.begins} to {each.ends}" + (f": {each.why}." if each.why else ".") for each in windows]
    return ["", "Nothing new is let on (what goes back never waits):", *told] if told else []


def _approvals(asked: Approvals | None) -> list[str]:
    if asked is None:
        return []
    before = "its promotion" if asked.before == "promote" else "any live traffic"
    people = f"{asked.count} of {', '.join(asked.by)}" if len(asked.by) > 1 else asked.by[0]
    then = "goes back" if asked.on_silence == "rollback" else "pauses"
    return [
        "",
        "People:",
        f"  - Before {before} {people} must approve, not who asked for it. The gates go on looking meanwhile.",
        f"  - An approval counts for {duration(asked.expires)}.",
        f"  - Without that for {duration(asked.wait)} the rollout {then}. Going back never waits for anybody.",
    ]


def _trigger(policy: Policy) -> str:
    kind, name = policy.trigger.kind, policy.trigger.name
    asks = {
        "alias": f"the alias '{name}' set on a version",
        "tag": f"the tag '{name}' set on a version",
        "version": "each new version",
    }.get(kind)
    if asks is None:
        return "Nothing in the registry asks for a delivery by it."
    whose = "" if policy.model else " of a model whose tag lockgate.policy names this policy"
    return f"In the registry {asks}{whose} asks for a delivery."


def _checks(policy: Policy) -> list[str]:
    checks, keys = policy.checks, len(policy.governance.public_keys)
    quality = checks.quality
    lines = ["The file must be a sound ONNX model that loads and answers in the real model server."]
    lines.append(f"Its answers must be those of the training framework, to within {checks.parity_tolerance:g}.")
    if keys:
        lines.append(f"Its bytes must be signed with {'the key' if keys == 1 else f'one of the {keys} keys'}.")
    lines.append("Its signature must be the champion's.")
    if checks.data:
        lines.append(f"The validation rows must meet the expectations in {checks.data}.")
    rows = checks.rows or "the rows that come with the version"
    lines.append(
        f"Quality ({quality.metric} of '{checks.label}' on {rows}) must be shown not to be worse than the champion's"
        f" by more than {quality.margin:g}, with confidence {quality.confidence:g}."
    )
    if quality.minimum is not None:
        lines.append(f"Quality must in any case be {quality.minimum:g} or better.")
    for column in checks.slices:
        lines.append(
            f"The same for each value of '{column}' with at least {checks.slice_rows_min} rows,"
            f" with a margin of {checks.slice_margin:g}."
        )
    return lines


def _benchmark(benchmark: Benchmark) -> list[str]:
    slo = benchmark.slo
    bars = [
        (slo.latency_ms_p99, "99 % of requests within {:g} ms"),
        (slo.throughput_rps_min, "at least {:g} requests a second"),
        (slo.memory_mb_max, "at most {:g} MB of memory"),
        (slo.load_s_max, "loaded within {:g} s"),
    ]
    lines = [f"On the target's hardware: {text.format(bar)}." for bar, text in bars if bar is not None]
    lines.append(
        f"Not slower than the champion by more than {100 * benchmark.regression_max:g} %,"
        f" measured side by side for {duration(benchmark.duration)}."
    )
    return lines


def _stages(rules: RolloutPolicy) -> list[str]:
    lines = []
    for stage in rules.stages:
        if stage.canary:
            what = f"{stage.canary.weight} % of the live traffic goes to the candidate"
        else:
            what = f"copies of {round(100 * stage.share)} % of the live requests go to the candidate, answers unused"
        lines.append(f"{what}, for at least {duration(stage.length_s)}.")
    lines.append(
        f"All traffic goes to the candidate; it is watched for {duration(rules.watch.length)}"
        f" against copies of {round(100 * rules.watch.shadow)} % sent to the former version, which stays warm."
    )
    lines.append("The former version is stopped. The candidate is the champion.")
    return lines


def _audience(audience: Audience) -> list[str]:
    user = f"{audience.key.kind} {audience.key.name}"
    lines = [f"Who has been with the candidate stays with it as its share grows: the {user} decides, if there is one."]
    for rule in audience.rules:
        values = ", ".join(rule.values[:5]) + (f" or one of {len(rule.values) - 5} more" if rule.values[5:] else "")
        whose = f"Requests with the {rule.key.kind} {rule.key.name}: {values}"
        where = "go to the candidate in every canary stage" if rule.to == "candidate" else (
            "stay with the stable version, uncopied, until the rollout has ended"
        )  # fmt: skip
        lines.append(f"{whose}, {where}; they count for no gate.")
    return lines


def _timeout(seconds: float | None) -> list[str]:
    if seconds is None:
        return []
    each = "a version that has not answered in half of it has failed, and the stable version is asked"
    return [f"Every request is answered within {duration(seconds)}: {each}."]


def _gates(gates: Gates) -> list[str]:
    lines = []
    if gates.errors:
        lines.append(f"errors: the candidate may not fail more often than the stable version by {gates.errors.margin}.")
    if gates.latency:
        lines.append(
            f"latency: the share of requests over {gates.latency.slo_ms:g} ms may not be larger"
            f" by {gates.latency.margin}."
        )
    if gates.drift:
        columns = ", ".join(gates.drift.columns)
        lines.append(
            f"drift: {columns} may differ by a {gates.drift.method} distance of {gates.drift.threshold:g} at most."
        )
    if gates.disagreement:
        lines.append(
            f"disagreement: in shadow, at most {100 * gates.disagreement.margin:g} % of the answers may differ"
            f" by more than {gates.disagreement.tolerance:g}."
        )
    if gates.quality:
        when = "must be shown before promotion, in the last stage" if gates.quality.required else "is not asked for"
        lines.append(
            f"quality: once labels come, its mean loss ({gates.quality.metric}) may not be higher by"
            f" {gates.quality.margin:g}; proof of that {when}; a label may lag by {duration(gates.quality.wait)}."
        )
    return lines or ["No gate is asked: nothing can pass a stage but a person's word."]


def _limits(rules: RolloutPolicy) -> list[str]:
    then = "the rollout goes back" if rules.on_exhausted == "rollback" else "the rollout pauses for a person"
    conflict = {
        "queue": "waits for its turn",
        "supersede": "takes the older one's place",
        "reject": "is turned away",
    }
    return [
        f"It looks every {duration(rules.look_every)}; a shown harm rolls back at once, and quarantines the bytes.",
        f"A stage that lacks evidence waits {duration(rules.patience)} longer; then {then}.",
        f"A source of evidence may be down for {duration(rules.grace)} before that counts.",
        f"If nobody renews it for {duration(rules.lease)}, the candidate's traffic goes back by itself.",
        f"A good version is rolled back in at most {100 * rules.error_budget:g} % of rollouts.",
        f"Another version that arrives meanwhile {conflict[rules.on_conflict]}.",
    ]


def _monitor(rules: Monitor) -> list[str]:
    lines = [
        f"It is looked at every {duration(rules.every)}; chance raises {rules.false_alarms_per_year:g} alarms a year."
    ]
    if rules.drift:
        columns = ", ".join(rules.drift.columns) or "its inputs"
        lines.append(
            f"drift: predictions and {columns} may not be {rules.drift.threshold:g} ({rules.drift.method}) away from"
            f" the training rows; {rules.drift.rows_min:,} rows are needed to say anything."
        )
    if rules.data:
        lines.append(f"data: the live rows must meet the expectations in {rules.data}.")
    if rules.quality:
        lines.append(
            f"quality: the mean loss ({rules.quality.metric}) on the labels that came may not be higher by"
            f" {rules.quality.margin:g} than on the validation rows; a label may lag by {duration(rules.quality.wait)}."
        )
    if rules.retrain:
        lines.append(f"When drift or a loss of quality begins, a run of {rules.retrain.deployment} is started.")
    back = ", ".join(rules.rollback_on)
    lines.append(f"An alarm about {back} brings the former version back." if back else "No alarm moves any traffic.")
    return lines
