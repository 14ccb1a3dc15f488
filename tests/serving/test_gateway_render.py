"""What the route table becomes in Envoy's configuration, accepted by Envoy itself."""

from __future__ import annotations

import json
import subprocess
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.traffic import Key, Route, Rule
from serving import gateway, gateway_routes
from serving.envoy import binary

SETTINGS = gateway.GatewaySettings(port=18080, access_log="access.log")
BACKENDS = [
    gateway.Backend("flights", "1", ("unix:run/1-0.sock", "unix:run/1-1.sock")),
    gateway.Backend("flights", "2.0", ("http://127.0.0.1:9001",)),
]
RULES = (
    Rule(Key("cookie", "session"), ("ann", "bob"), "stable"),
    Rule(Key("header", "x-tenant"), ("bank (old)",), "stable"),
    Rule(Key("header", "x-tenant"), ("acme", "labs.eu"), "candidate"),
)
ROUTES = {
    "stable-only": Route("flights", "1", epoch=1),
    "shadow": Route("flights", "1", "2.0", shadow=40, epoch=2),
    "canary": Route("flights", "1", "2.0", weight=5, epoch=3, lease_s=15),
    "watching": Route("flights", "1", "2.0", weight=100, shadow=10, epoch=4),
    "ruled": Route("flights", "1", "2.0", weight=5, epoch=6, rules=RULES),
    "ruled-shadow": Route("flights", "1", "2.0", shadow=40, epoch=7, key=Key("cookie", "session"), rules=RULES),
    "ruled-watching": Route("flights", "1", "2.0", weight=100, shadow=10, epoch=8, rules=RULES),
    "timed": Route("flights", "1", "2.0", weight=5, epoch=9, timeout_s=0.5),
    "first": Route("flights", None, "2.0", weight=100, epoch=5),
}
GOLDEN = Path(__file__).with_name("golden")


def rendered(name: str) -> list[dict[str, object]]:
    return gateway_routes.route_resources([ROUTES[name]], SETTINGS)


def clusters() -> list[dict[str, object]]:
    return gateway.cluster_resources(BACKENDS, SETTINGS)


@pytest.mark.parametrize("name", ["clusters", *ROUTES])
def test_a_route_renders_as_agreed(name: str) -> None:
    """The golden files are what was reviewed. After a wanted change: delete the file, run again, review the diff."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(clusters() if name == "clusters" else rendered(name), indent=1, sort_keys=True) + "\n"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path.name} was written anew: review it")
    assert text == path.read_text()


def validate(routes: list[Route], folder: Path) -> None:
    """`--mode validate` reads clusters, routes and listener as one static configuration, all cross-checked."""
    bootstrap = gateway.bootstrap(SETTINGS, folder)
    del bootstrap["dynamic_resources"]
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["rds"]
    [table] = gateway_routes.route_resources(routes, SETTINGS)
    manager["route_config"] = {**table, "validate_clusters": True}
    manager["route_config"].pop("@type")
    bootstrap["static_resources"]["clusters"] += [
        {key: value for key, value in one.items() if key != "@type"} for one in clusters()
    ]
    path = folder / "envoy.json"
    path.write_text(json.dumps(bootstrap))
    done = subprocess.run(
        [binary(), "--mode", "validate", "-c", path, "-l", "error"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,  # it opens the access log, too
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


@pytest.mark.parametrize("name", ROUTES)
def test_envoy_accepts_what_is_rendered(name: str, tmp_path: Path) -> None:
    validate([ROUTES[name]], tmp_path)


@given(
    weight=st.integers(0, 100),
    shadow=st.integers(0, 100),
    stable=st.sampled_from(["1", None]),
    candidate=st.just("2.0"),
)
def test_weights_sum_to_100_and_every_cluster_named_exists(
    weight: int, shadow: int, stable: str | None, candidate: str
) -> None:
    if stable is None:
        weight = 100
    route = Route("flights", stable, candidate, weight=weight, shadow=shadow, rules=RULES)
    [table] = gateway_routes.route_resources([route], SETTINGS)
    names = {cluster["name"] for cluster in clusters()}
    for entry in table["virtual_hosts"][0]["routes"]:
        if "route" not in entry:
            continue
        split = entry["route"]["weighted_clusters"]["clusters"]
        assert sum(cluster["weight"] for cluster in split) == 100
        mirrors = [mirror["cluster"] for mirror in entry["route"].get("request_mirror_policies", [])]
        assert {cluster["name"] for cluster in split} | set(mirrors) <= names


def test_the_candidate_comes_first_which_makes_the_split_monotone() -> None:
    assert gateway_routes.shares(ROUTES["canary"]) == [("2.0", 5), ("1", 95)]


def test_what_is_not_split_by_chance_is_counted_apart_marked_and_not_copied() -> None:
    for name in ("canary", "watching", "ruled", "ruled-shadow", "ruled-watching"):
        [table] = gateway_routes.route_resources([ROUTES[name]], SETTINGS)
        for entry in table["virtual_hosts"][0]["routes"]:
            if "route" not in entry:
                continue
            asked = [cluster["name"] for cluster in entry["route"]["weighted_clusters"]["clusters"]]
            marked = [one["header"]["key"] for one in entry.get("request_headers_to_add", ())]
            assert marked[-2:] == ["x-lockgate-again", "x-request-timeout-ms"]
            if asked[0].startswith("ruled/"):
                assert (len(asked), marked[:-2]) == (1, ["x-lockgate-apart"])
                assert "request_mirror_policies" not in entry["route"]
            else:
                assert len(marked) == 2
                assert all(cluster.startswith("arm/") for cluster in asked)
        assert table["request_headers_to_remove"] == ["x-lockgate-apart"]


def test_a_rule_with_a_thousand_values_is_accepted(tmp_path: Path) -> None:
    values = tuple(f"user-{number}@example.com" for number in range(1000))
    route = Route("flights", "1", "2.0", weight=5, rules=(Rule(Key("header", "x-user"), values, "candidate"),))
    validate([route], tmp_path)


def test_copies_go_to_whoever_does_not_answer() -> None:
    assert gateway_routes.shadowed(ROUTES["shadow"]) == "2.0"
    assert gateway_routes.shadowed(ROUTES["watching"]) == "1"
    assert gateway_routes.shadowed(ROUTES["canary"]) is None


@given(model=st.text(min_size=1), version=st.text(min_size=1), role=st.sampled_from(["live", "shadow", "rescue"]))
def test_cluster_names_keep_statistics_apart(model: str, version: str, role: str) -> None:
    name = gateway.cluster_name(role, model, version)
    assert not set(".: ") & set(name)
    assert name.count("/") == 2


def test_the_version_of_a_content_changes_with_it_and_only_with_it() -> None:
    versions = {gateway.content_version(rendered(name)) for name, _ in product(ROUTES, range(2))}
    assert len(versions) == len(ROUTES)


@pytest.mark.parametrize("url", ["tcp://x:1", "http://host", "run/1.sock", ""])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="is no endpoint; write unix:/path or http://host:port"):
        gateway.cluster_resources([gateway.Backend("m", "1", (url,))], SETTINGS)
