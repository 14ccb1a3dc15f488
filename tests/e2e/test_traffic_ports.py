"""The node agent with a real Envoy keeps the contract of the Target and Router ports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.router_envoy import EnvoyRouter
from infra.target_local import LocalTarget
from tests.ports.traffic_contract import Node, TrafficContract
from tests.serving.running_agent import RunningAgent

pytestmark = pytest.mark.e2e


class TestLocalTraffic(TrafficContract):
    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        agent = RunningAgent(tmp_path).start()
        target, router = LocalTarget(agent.home), EnvoyRouter(agent.home)
        yield Node(target, router, tmp_path, time.sleep)
        agent.stop()
