"""The fake Probe keeps the port's contract."""

from __future__ import annotations

import pytest

from tasks.ports import Endpoint
from tests.fakes.probe import FakeProbe
from tests.ports.probe_contract import ProbeContract


class TestFakeProbe(ProbeContract):
    @pytest.fixture
    def probe(self) -> FakeProbe:
        fake = FakeProbe()
        fake.answers["1"] = (0.1, 0.2, 0.3)
        fake.absent.add("2")
        return fake

    @pytest.fixture
    def there(self) -> Endpoint:
        return Endpoint("m", "1", "unix:/nowhere")

    @pytest.fixture
    def absent(self) -> Endpoint:
        return Endpoint("m", "2", "unix:/nowhere")
