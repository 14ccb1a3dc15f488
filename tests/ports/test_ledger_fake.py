"""The fake Ledger keeps the port's contract, so what is tested with it holds with a real one."""

from __future__ import annotations

import pytest

from tasks.ports import PortError, Refused
from tests.fakes.ledger import FakeLedger
from tests.ports.ledger_contract import NOW, Connect, LedgerContract


class TestFakeLedger(LedgerContract):
    @pytest.fixture
    def connect(self) -> Connect:
        ledger = FakeLedger(lambda: NOW)
        return lambda: ledger

    @pytest.fixture
    def fake(self) -> FakeLedger:
        return FakeLedger()

    def test_down_means_down(self, fake: FakeLedger) -> None:
        fake.down = True
        for call in (fake.head, fake.rollouts, fake.unsettled, fake.quarantines, lambda: list(fake.lines())):
            with pytest.raises(PortError):
                call()

    def test_a_fault_before_leaves_nothing_and_one_after_leaves_the_entry(self, fake: FakeLedger) -> None:
        calls: list[str] = []

        def fail(call: str) -> None:
            calls.append(call)
            raise PortError("cut off")

        fake.before = fail
        with pytest.raises(PortError, match="cut off"):
            fake.append("r1", 1, 0.0, "t", "noted", {})
        fake.before, fake.after = lambda _call: None, fail
        assert fake.entries == []
        with pytest.raises(PortError, match="cut off"):
            fake.append("r1", 1, 0.0, "t", "noted", {})
        assert calls == ["append", "append"]
        assert [entry.sequence for entry in fake.entries] == [1]

    def test_somebody_else_can_come_first(self, fake: FakeLedger) -> None:
        def other(_call: str) -> None:
            fake.before = lambda _call: None
            fake.append("r1", 1, 0.0, "other", "noted", {})

        fake.before = other
        with pytest.raises(Refused):
            fake.append("r1", 1, 0.0, "t", "noted", {})
