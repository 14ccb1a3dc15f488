"""Sampled rows: bounded, newest first kept, whatever the servers delete meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from infra.samples_arrow import SampledRows
from tasks.ports import PortError


def segment(home: Path, name: str, times: list[float], **columns: list[float]) -> Path:
    folder = home / "samples" / "flights" / "3"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "request_id": [f"{name}-{index}" for index in range(len(times))],
            "row": pa.array([0] * len(times), pa.int32()),
            "time": times,
            **columns,
            "prediction": [0.5] * len(times),
            "status": pa.array([200] * len(times), pa.int16()),
        }
    )
    path = folder / f"{name}.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.utime(path, (times[-1], times[-1]))
    return path


def test_rows_since_a_time_come_in_order_over_segments(tmp_path: Path) -> None:
    segment(tmp_path, "b-0", [103.0, 105.0])
    segment(tmp_path, "a-0", [100.0, 102.0, 104.0])
    rows = SampledRows(tmp_path).read("flights", "3", since=102.0)
    assert rows["time"].to_pylist() == [102.0, 103.0, 104.0, 105.0]


def test_the_newest_rows_are_kept_when_there_are_too_many(tmp_path: Path) -> None:
    for number in range(10):
        segment(tmp_path, f"a-{number}", [1000.0 + 10 * number + second for second in range(10)])
    rows = SampledRows(tmp_path).read("flights", "3", since=0.0, rows_max=15)
    assert rows["time"].to_pylist() == [1085.0 + second for second in range(15)]


def test_of_very_many_segments_only_some_are_opened(tmp_path: Path) -> None:
    for number in range(6):
        segment(tmp_path, f"a-{number}", [1000.0 + 10 * number, 1001.0 + 10 * number])
    rows = SampledRows(tmp_path).read("flights", "3", since=0.0, segments_max=3)
    assert rows["time"].to_pylist() == [1010.0, 1011.0, 1030.0, 1031.0, 1050.0, 1051.0]
    assert SampledRows(tmp_path).read("flights", "3", since=0.0, segments_max=6).num_rows == 12
    assert SampledRows(tmp_path).read("flights", "4", since=0.0, segments_max=6).num_rows == 0


def test_no_samples_are_an_empty_table(tmp_path: Path) -> None:
    assert SampledRows(tmp_path).read("flights", "3", since=0.0).num_rows == 0
    segment(tmp_path, "a-0", [100.0])
    assert SampledRows(tmp_path).read("flights", "3", since=200.0).num_rows == 0


def test_a_segment_that_vanishes_while_reading_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment(tmp_path, "a-0", [100.0])
    vanishing = segment(tmp_path, "a-1", [101.0])
    opened = pa.memory_map

    def deleting(path: str) -> object:
        vanishing.unlink(missing_ok=True)
        return opened(path)

    monkeypatch.setattr(pa, "memory_map", deleting)
    assert SampledRows(tmp_path).read("flights", "3", since=0.0)["time"].to_pylist() == [100.0]


def test_a_column_that_came_later_is_null_before(tmp_path: Path) -> None:
    segment(tmp_path, "a-0", [100.0])
    segment(tmp_path, "a-1", [101.0], **{"in.f.0": [7.0]})
    assert SampledRows(tmp_path).read("flights", "3", since=0.0)["in.f.0"].to_pylist() == [None, 7.0]


def test_bytes_that_are_no_arrow_file_are_named(tmp_path: Path) -> None:
    path = segment(tmp_path, "a-0", [100.0])
    path.write_bytes(b"not arrow")
    with pytest.raises(PortError, match=r"a-0\.arrow cannot be read"):
        SampledRows(tmp_path).read("flights", "3", since=0.0)


def test_rows_of_a_period_are_spread_over_all_of_it_however_many_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.samples_arrow._SPREAD_SEGMENTS_MAX", 50)
    for number in range(100):
        segment(tmp_path, f"a-{number:03}", [1000.0 + number + step / 40 for step in range(40)])
    rows = SampledRows(tmp_path)
    for most in (100, 1000):
        times = rows.spread("flights", "3", 1000.0, 1090.0, most)["time"].to_pylist()
        assert most / 2 <= len(times) <= most
        assert times == sorted(times)
        parts = [sum(1000.0 + 30 * part <= at < 1030.0 + 30 * part for at in times) for part in range(3)]
        assert max(parts) <= 1.2 * min(parts)
    assert rows.spread("flights", "4", 1000.0, 1090.0).num_rows == 0
