"""What the route table becomes in Envoy's configuration, accepted by Envoy itself."""

from __future__ import annotations

import json
import subprocess
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.traffic import Route
from serving import gateway
from serving.envoy import binary

SETTINGS = gateway.GatewaySettings(port=18080, access_log="access.log")
BACKENDS = [
    gateway.Backend("flights", "1", ("unix:run/1-0.sock", "unix:run/1-1.sock")),
    gateway.Backend("flights", "2.0", ("http://127.0.0.1:9001",)),
]
ROUTES = {
    "stable-only": Route("flights", "1", epoch=1),
    "shadow": Route("flights", "1", "2.0", shadow=40, epoch=2),
    "canary": Route("flights", "1", "2.0", weight=5, epoch=3, lease_s=15),
    "watching": Route("flights", "1", "2.0", weight=100, shadow=10, epoch=4),
    "first": Route("flights", None, "2.0", weight=100, epoch=5),
}
GOLDEN = Path(__file__).with_name("golden")


def rendered(name: str) -> dict[str, object]:
    route = ROUTES[name]
    return {
        "clusters": gateway.cluster_resources(BACKENDS, SETTINGS),
        "routes": gateway.route_resources([route], SETTINGS),
    }


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_renders_as_agreed(name: str) -> None:
    """The golden files are what was reviewed. After a wanted change: delete the file, run again, review the diff."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(rendered(name), indent=1, sort_keys=True) + "\n"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path.name} was written anew: review it")
    assert text == path.read_text()


@pytest.mark.parametrize("name", ROUTES)
def test_envoy_accepts_what_is_rendered(name: str, tmp_path: Path) -> None:
    """`--mode validate` reads clusters, routes and listener as one static configuration, all cross-checked."""
    bootstrap = gateway.bootstrap(SETTINGS, tmp_path)
    del bootstrap["dynamic_resources"]
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["rds"]
    body = rendered(name)
    manager["route_config"] = {**body["routes"][0], "validate_clusters": True}  # type: ignore[index]
    manager["route_config"].pop("@type")
    clusters = [{key: value for key, value in one.items() if key != "@type"} for one in body["clusters"]]  # type: ignore[attr-defined]
    bootstrap["static_resources"]["clusters"] = clusters
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(bootstrap))
    done = subprocess.run(
        [binary(), "--mode", "validate", "-c", path, "-l", "error"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


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
    route = Route("flights", stable, candidate, weight=weight, shadow=shadow)
    [table] = gateway.route_resources([route], SETTINGS)
    names = {cluster["name"] for cluster in gateway.cluster_resources(BACKENDS, SETTINGS)}
    for entry in table["virtual_hosts"][0]["routes"]:
        if "route" not in entry:
            continue
        clusters = entry["route"]["weighted_clusters"]["clusters"]
        assert sum(cluster["weight"] for cluster in clusters) == 100
        mirrors = [mirror["cluster"] for mirror in entry["route"].get("request_mirror_policies", [])]
        assert {cluster["name"] for cluster in clusters} | set(mirrors) <= names


def test_a_change_of_traffic_leaves_the_clusters_as_they_are() -> None:
    """So that nothing is counted anew, and no connection is made anew, because of a change of weights."""
    assert len({json.dumps(rendered(name)["clusters"]) for name in ROUTES}) == 1


def test_the_candidate_comes_first_which_makes_the_split_monotone() -> None:
    assert gateway.shares(ROUTES["canary"]) == [("2.0", 5), ("1", 95)]


def test_copies_go_to_whoever_does_not_answer() -> None:
    assert gateway.shadowed(ROUTES["shadow"]) == "2.0"
    assert gateway.shadowed(ROUTES["watching"]) == "1"
    assert gateway.shadowed(ROUTES["canary"]) is None


@given(model=st.text(min_size=1), version=st.text(min_size=1), role=st.sampled_from(["live", "shadow", "rescue"]))
def test_cluster_names_are_read_back_and_keep_statistics_apart(model: str, version: str, role: str) -> None:
    name = gateway.cluster_name(role, model, version)
    assert gateway.cluster_parts(name) == (role, model, version)
    assert not set(".: ") & set(name)
    assert name.count("/") == 2


def test_names_that_are_no_version_s_cluster_stand_for_nothing() -> None:
    for name in ("arm/m/2+1", "xds", "live/only-two", "live/a/b/c"):
        assert gateway.cluster_parts(name) is None


def test_the_version_of_a_content_changes_with_it_and_only_with_it() -> None:
    versions = {gateway.content_version(rendered(name)) for name, _ in product(ROUTES, range(2))}
    assert len(versions) == len(ROUTES)


@pytest.mark.parametrize("url", ["tcp://x:1", "http://host", "run/1.sock", ""])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="is no endpoint; write unix:/path or http://host:port"):
        gateway.cluster_resources([gateway.Backend("m", "1", (url,))], SETTINGS)
