"""What every Probe promises.

A subclass gives `probe`, `there` (an endpoint that answers rows of `x.0,x.1`) and `absent` (nobody listens there).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.ports import BadInput, Endpoint, PortError, Probe


class ProbeContract:
    """Inherit it."""

    @pytest.fixture
    def few(self, tmp_path: Path) -> Path:
        path = tmp_path / "few.csv"
        path.write_text("x.0,x.1,late\n1,1,0\n2,1,1\n3,1,0\n")
        return path

    def test_as_many_predictions_as_rows_and_no_more_than_the_limit(
        self, probe: Probe, there: Endpoint, few: Path
    ) -> None:
        whole = probe.ask(there, few, "late", 10)
        assert len(whole.predictions) == 3
        assert whole.failures == ()
        assert probe.ask(there, few, "late", 2).predictions == whole.predictions[:2]

    def test_a_race_has_one_result_for_each_endpoint_in_order(self, probe: Probe, there: Endpoint, few: Path) -> None:
        assert len(probe.race([there, there], few, "late", 0.2)) == 2
        assert probe.race([], few, "late", 0.2) == []

    def test_nobody_there_is_an_error_and_no_answer(self, probe: Probe, absent: Endpoint, few: Path) -> None:
        with pytest.raises(PortError, match="is not there") as caught:
            probe.ask(absent, few, "late", 10)
        assert not isinstance(caught.value, BadInput)
        with pytest.raises(PortError, match="is not there"):
            probe.race([absent], few, "late", 0.2)

    def test_rows_that_are_not_there_are_bad_input(self, probe: Probe, there: Endpoint, tmp_path: Path) -> None:
        for ask in (
            lambda: probe.ask(there, tmp_path / "none.csv", "late", 10),
            lambda: probe.race([there], tmp_path / "none.csv", "late", 0.2),
        ):
            with pytest.raises(BadInput, match=r"none\.csv: no such file"):
                ask()
