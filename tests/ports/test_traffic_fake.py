"""The fake Target and Router keep the ports' contract, so what is tested with them holds with real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.router import FakeRouter
from tests.fakes.target import FakeTarget
from tests.ports.traffic_contract import Node, TrafficContract


class TestFakeTraffic(TrafficContract):
    @pytest.fixture
    def node(self, tmp_path: Path) -> Node:
        clock, target = FakeClock(), FakeTarget()
        return Node(target, FakeRouter(clock, target), tmp_path, clock.sleep)
