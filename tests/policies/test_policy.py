"""The policy file: what is wrong in it is told with its line, the offending value and what would mend it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policies import policy
from policies.policy import Policy, PolicyError
from policies.policy_yaml import parse
from policies.words import explain

SOUND = """
policy: flights-cpu
rollout:
  stages:
    - shadow: {share: 1.0, for: 2m}
    - canary: {weight: 5, for: 5m}
    - canary: {weight: 25, for: 10m}
"""
GATES = "rollout:\n  gates: "
APPROVALS = "governance: {approvals: {count: 2, by: "
LIBRARY = Path(policy.__file__).parent / "library"


def refused(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        parse(text, "p.yaml")
    return str(caught.value)


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one() -> None:
    told = refused(SOUND.replace("weight: 25", "wieght: 25"))
    assert "line 7" in told
    assert "'rollout.stages.2.canary.wieght'" in told
    assert "did you mean 'weight'?" in told


def test_an_unknown_key_with_nothing_near_lists_what_is_known() -> None:
    assert "known here: " in refused(SOUND + "zzzzzz: 1\n")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weight: 5,", "weight: 0,", "greater than or equal to 1"),
        ("weight: 5,", "weight: 100,", "less than or equal to 99"),
        ("for: 2m", "for: 120", "has no unit"),
        ("for: 2m", "for: soon", "is not a duration"),
        ("for: 2m", "for: 0s", "greater than 0"),
        ("share: 1.0", "share: 1.5", "less than or equal to 1"),
        ("share: 1.0", "share: .nan", "finite"),
        ("share: 1.0", "share: 0.004", "choose 0.01 at least"),
        ("weight: 25", "weight: 5", "must rise from stage to stage"),
        ("rollout:", "rollout:\n  lease: 1s", "at least twice look_every"),
        ("rollout:", "rollout:\n  error_budget: 0", "greater than 0"),
        ("rollout:", "rollout:\n  error_budget: 1.5", "less than 1"),
        ("rollout:", "rollout:\n  timeout: 2m", "less than or equal to 30"),
        ("policy: flights-cpu", "policy: Flights CPU", "match pattern"),
        ("rollout:", GATES + "{drift: {method: ks, rows_min: 4001}}", "ks compares 4,000 rows of each version at most"),
        ("rollout:", GATES + "{drift: {rows_min: 20001}}", "rows_min is 20,001, and wasserstein compares 20,000 rows"),
        ("rollout:", "monitor: {drift: {rows_min: 8001}}\nrollout:", "8,000 rows are compared at most"),
        ("rollout:", GATES + "{latency: {slo_ms: 15000}}", "slo_ms is 15000, and a request is answered within 15s"),
        ("rollout:", GATES + "{latency: {slo_ms: 14900}}", "choose 14719 at most, or a longer time-out"),
        ("rollout:", GATES + "{latency: {slo_ms: 90}}\n  timeout: 80ms", "a request is answered within 0.08s"),
        ("rollout:", GATES + "{latency: {slo_ms: 36000}}\n  timeout: 30s", "choose 29053 at most"),
        (
            "rollout:",
            GATES + "{latency: {slo_ms: 0.02}}",
            "0.02 is less than a millisecond, in which the",
        ),
        ("rollout:", "rollout:\n  burn_in: 12m", "burn_in (720s) leaves the first stage no evidence"),
        ("rollout:", "rollout:\n  burn_in: 2m\n  patience: 0s", "with `patience` it ends after 120s"),
        (
            "rollout:",
            "monitor: {rollback_on: [quality]}\nrollout:",
            "names 'quality', and nobody asks for it: add",
        ),
        ("rollout:", "monitor: {rollback_on: [data]}\nrollout:", "add `data: FILE`"),
        ("rollout:", "monitor: {drift: null, rollback_on: [drift]}\nrollout:", "take `drift: null` away"),
        (
            "rollout:",
            "monitor: {drift: null, data: live.yaml, retrain: {deployment: train/it}}\nrollout:",
            "retrain starts with an alarm of drift or quality, and nobody asks for either: take `drift: null` away, or",
        ),
        ("rollout:", APPROVALS + "[alice, Alice]}}\nrollout:", "'alice' and 'Alice' are one person"),
        ("rollout:", APPROVALS + "[alice, 'alice ']}}\nrollout:", "'alice' and 'alice ' are one person"),
        ("rollout:", APPROVALS + "[alice, bob, alice]}}\nrollout:", "name each person once"),
        ("rollout:", APPROVALS + "[jos\u00e9, jose\u0301]}}\nrollout:", "composed letters"),
    ],
)
def test_an_impossible_value_is_told_with_its_line(old: str, new: str, words: str) -> None:
    told = refused(SOUND.replace(old, new))
    assert words in told
    assert "p.yaml, line " in told


@pytest.mark.parametrize(
    "gates",
    [
        "{drift: {method: ks, rows_min: 4000}}",
        "{drift: {rows_min: 20000}}",
        "{latency: {slo_ms: 14719}}",
        "{latency: {slo_ms: 29053}}\n  timeout: 30s",
    ],
)
def test_the_largest_value_that_can_be_met_is_accepted(gates: str) -> None:
    parse(SOUND.replace("rollout:", GATES + gates))


@pytest.mark.parametrize(
    "more",
    [
        GATES + "{latency: {slo_ms: 1}}",
        "rollout:\n  burn_in: 719s",
        "rollout:\n  burn_in: 119s\n  patience: 0s",
        "monitor: {rollback_on: [drift], retrain: {deployment: train/it}}\nrollout:",
        "monitor: {drift: null, quality: {}, rollback_on: [quality], retrain: {deployment: train/it}}\nrollout:",
    ],
)
def test_the_least_that_can_be_met_is_accepted(more: str) -> None:
    parse(SOUND.replace("rollout:", more))


def test_a_policy_of_an_older_ledger_can_be_read_whatever_a_new_one_is_refused_for() -> None:
    kept = parse(SOUND).model_dump(mode="json", by_alias=True)
    kept["rollout"] |= {"burn_in": "1h", "patience": "0s", "gates": {"latency": {"slo_ms": 0.02}}}
    kept["monitor"] = {"drift": None, "rollback_on": ["drift", "data"], "retrain": {"deployment": "train/it"}}
    assert Policy.model_validate(kept).rollout.gates.latency.slo_ms == 0.02  # type: ignore[union-attr]


def test_a_key_given_twice_is_refused_instead_of_silently_keeping_the_last() -> None:
    assert "line 9: 'policy' is given twice" in refused(SOUND + "\npolicy: other\n")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "governance: {freeze: [{from: 2026-02-30, to: 2026-03-01}]}",
            "line 8: '2026-02-30' cannot be read: day is",
        ),
        ("watch: 0x_", "line 8: '0x_' cannot be read"),
        ("? [a, b]\n: 1", "line 8: a key is a word, not a list or a mapping"),
        ("x: " + 3000 * "[", "nested too deeply for a policy"),
    ],
)
def test_what_yaml_itself_trips_over_is_a_sentence_too(more: str, says: str) -> None:
    assert says in refused(SOUND + more + "\n")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "policy: [unclosed"])
def test_what_is_no_mapping_is_refused_in_one_sentence(text: str) -> None:
    told = refused(text)
    assert told.startswith("p.yaml: ")
    assert "\n" not in told


def test_shadow_after_canary_is_refused() -> None:
    assert "shadow stages come before canary" in refused(SOUND + "    - shadow: {share: 1.0, for: 1m}\n")


def test_the_same_rules_have_the_same_digest_however_they_are_written() -> None:
    other = SOUND.replace("2m", "120s").replace("{weight: 5, for: 5m}", "{for: 300s, weight: 5}")
    assert parse(SOUND).digest == parse(other).digest
    assert parse(SOUND).digest != parse(SOUND.replace("weight: 25", "weight: 26")).digest


def test_a_policy_kept_as_json_and_read_again_is_the_same_policy() -> None:
    kept = json.loads(json.dumps(parse(SOUND).model_dump(mode="json", by_alias=True)))
    assert Policy.model_validate(kept) == parse(SOUND)


def test_the_schema_knows_the_keys_of_the_file_not_of_the_code() -> None:
    schema = policy.schema()
    assert {"policy", "validate", "benchmark", "rollout"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert "for" in schema["$defs"]["Canary"]["properties"]


def test_the_schema_tells_the_rules_that_are_for_new_policies_only() -> None:
    kinds = policy.schema()["$defs"]
    assert kinds["Shadow"]["properties"]["share"]["minimum"] == 0.01
    assert kinds["Watch"]["properties"]["shadow"]["minimum"] == 0.01
    assert kinds["LiveDrift"]["properties"]["rows_min"]["maximum"] == 8000
    assert kinds["Latency"]["properties"]["slo_ms"]["minimum"] == 1
    assert kinds["Approvals"]["properties"]["by"]["uniqueItems"] is True


@pytest.mark.parametrize("file", sorted(LIBRARY.glob("*.yaml")), ids=lambda file: file.name)
def test_every_ready_made_policy_is_sound_and_names_files_that_are_there(file: Path) -> None:
    if file.stem.endswith("expectations"):
        return
    found = parse(file.read_text(), file.name)
    assert found.name == file.stem
    if found.checks.data:
        assert (LIBRARY / found.checks.data).is_file()
    assert len(explain(found)) > 10


def test_what_monitor_is_told_is_checked_like_the_rest() -> None:
    asked = "{every: 1d, quality: {}, rollback_on: [quality], retrain: {deployment: train/flights}}"
    made = parse(SOUND + f"monitor: {asked}\n").monitor
    assert (made.every, made.rollback_on, made.false_alarms_per_year) == (86400.0, ("quality",), 0.1)
    assert "'monitor.every'" in refused(SOUND + "monitor: {every: 10s}\n")
    assert "did you mean 'rollback_on'?" in refused(SOUND + "monitor: {rolback_on: [drift]}\n")
    assert "'monitor.retrain.deployment'" in refused(SOUND + "monitor: {retrain: {deployment: train}}\n")


KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----"""


def test_keys_are_read_from_pem_and_what_is_none_is_refused() -> None:
    indented = "\n".join(f"      {line}" for line in KEY.splitlines())
    found = parse(SOUND + "governance:\n  signed_by:\n    - |\n" + indented + "\n")
    assert found.governance.public_keys == ("MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=",)
    assert "  - Its bytes must be signed with the key." in explain(found)
    folded = parse(SOUND + "governance:\n  signed_by:\n    - " + indented.lstrip() + "\n")  # YAML makes one line of it
    assert folded.governance.public_keys == found.governance.public_keys
    told = refused(SOUND + "governance:\n  signed_by: [/etc/keys/release.pem]\n")
    assert "line 9: 'governance.signed_by': a public key stands between BEGIN PUBLIC KEY and END PUBLIC KEY" in told
