"""What every Target with its Router promises: run on the fakes, and on the node agent with a real Envoy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from policies.traffic import Route
from tasks.ports import Deployment, Refused, Router, Target

MODEL = "contract"


@dataclass
class Node:
    """A target, its router, a folder for files, and how time passes there."""

    target: Target
    router: Router
    folder: Path
    wait: Callable[[float], None]

    def wanted(self, version: str, words: str = "model") -> Deployment:
        body = json.dumps({"mode": "ok", "salt": words + version}).encode()  # what the stand-in server reads
        path = self.folder / f"{version}.onnx"
        path.write_bytes(body)
        return Deployment(MODEL, version, hashlib.sha256(body).hexdigest(), path)


class TrafficContract:
    """Inherit and give a fixture `node`."""

    def test_what_is_deployed_runs_and_is_stored_by_its_digest(self, node: Node) -> None:
        wanted = node.wanted("1")
        assert len(node.target.deploy(wanted)) == 1
        assert node.target.running(MODEL) == {"1": wanted.digest}
        assert node.target.stored(wanted.digest) is not None
        assert node.target.stored("0" * 64) is None

    def test_deploying_twice_is_deploying_once(self, node: Node) -> None:
        first, second = node.target.deploy(node.wanted("1")), node.target.deploy(node.wanted("1"))
        assert [each.url for each in first] == [each.url for each in second]

    def test_other_bytes_under_a_version_that_runs_are_refused(self, node: Node) -> None:
        node.target.deploy(node.wanted("1"))
        with pytest.raises(Refused):
            node.target.deploy(node.wanted("1", "other"))

    def test_a_trial_is_apart_from_the_live_version(self, node: Node) -> None:
        node.target.deploy(node.wanted("1"), trial=True)
        assert node.target.running(MODEL) == {}
        node.target.undeploy(MODEL, "1", trial=True)
        node.target.undeploy(MODEL, "1", trial=True)

    def test_what_gets_traffic_cannot_be_undeployed(self, node: Node) -> None:
        node.target.deploy(node.wanted("1"))
        node.router.apply(Route(MODEL, stable="1", epoch=1))
        with pytest.raises(Refused):
            node.target.undeploy(MODEL, "1")
        assert "1" in node.target.running(MODEL)

    def test_a_version_that_does_not_run_gets_no_traffic(self, node: Node) -> None:
        with pytest.raises(Refused):
            node.router.apply(Route(MODEL, stable="1", epoch=1))
        assert node.router.current(MODEL) is None

    def test_an_older_epoch_is_refused_and_changes_nothing(self, node: Node) -> None:
        self._two(node)
        newer = Route(MODEL, stable="1", candidate="2", weight=20, epoch=5, lease_s=30.0)
        node.router.apply(newer)
        with pytest.raises(Refused):
            node.router.apply(Route(MODEL, stable="1", candidate="2", weight=90, epoch=4, lease_s=30.0))
        assert node.router.current(MODEL) == newer

    def test_the_same_change_again_changes_nothing(self, node: Node) -> None:
        self._two(node)
        route = Route(MODEL, stable="1", candidate="2", weight=20, epoch=5, lease_s=30.0)
        node.router.apply(route)
        node.router.apply(route)
        assert node.router.routes() == {MODEL: route}

    def test_only_the_epoch_in_force_renews_the_lease(self, node: Node) -> None:
        self._two(node)
        node.router.apply(Route(MODEL, stable="1", candidate="2", weight=20, epoch=5, lease_s=30.0))
        node.router.renew(MODEL, 5)
        with pytest.raises(Refused):
            node.router.renew(MODEL, 4)

    def test_a_lease_that_runs_out_ends_the_candidate_s_share_for_good(self, node: Node) -> None:
        self._two(node)
        route = Route(MODEL, stable="1", candidate="2", weight=20, epoch=5, lease_s=1.0)
        node.router.apply(route)
        node.wait(2.5)
        seen = node.router.current(MODEL)
        assert seen is not None
        assert (seen.stable, seen.candidate, seen.weight) == ("1", None, 0)
        with pytest.raises(Refused):
            node.router.renew(MODEL, 5)
        with pytest.raises(Refused):
            node.router.apply(route)
        with pytest.raises(Refused):  # who comes late with the next step stood still while the share ended
            node.router.apply(replace(route, epoch=6, weight=50, continues=True))
        node.router.apply(replace(route, epoch=7, weight=1))
        node.router.apply(replace(route, epoch=8, weight=2, continues=True))

    def _two(self, node: Node) -> None:
        node.target.deploy(node.wanted("1"))
        node.target.deploy(node.wanted("2"))
        node.router.apply(Route(MODEL, stable="1", epoch=1))
