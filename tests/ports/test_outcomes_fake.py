"""The fake Telemetry keeps the contract of labelled answers."""

from __future__ import annotations

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.router import FakeRouter
from tests.fakes.target import FakeTarget
from tests.fakes.telemetry import Behaviour, FakeTelemetry
from tests.ports.outcomes_contract import OutcomesContract, Served


class TestFakeOutcomes(OutcomesContract):
    @pytest.fixture
    def served(self) -> Served:
        def serve(stable: float, candidate: float, labelled: float) -> FakeTelemetry:
            clock = FakeClock()
            fake = FakeTelemetry(clock, FakeRouter(clock, FakeTarget()))
            fake.behaviour = {"1": Behaviour(wrong=stable), "2": Behaviour(wrong=candidate)}
            fake.requests = {("m", "1", False): 1000.0, ("m", "2", True): 1000.0}
            fake.labelled = labelled
            return fake

        return serve
