"""Sampled rows: the same requests everywhere, complete files only, bounded in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.metrics import Metrics
from serving.samples import UNSAMPLED, Samples, SampleSettings, chosen
from serving.tensors import BY_NAME, Tensor

INPUTS = [Tensor("f", BY_NAME["FP32"], ("N", 2)), Tensor("s", BY_NAME["BYTES"], ("N",))]


def sampler(folder: Path, inputs: list[Tensor] = INPUTS, **more: object) -> tuple[Samples, Metrics]:
    metrics = Metrics("m", "1", "epoch")
    return Samples(SampleSettings(folder, **more), inputs, "epoch", metrics), metrics


def feeds(rows: int) -> dict[str, np.ndarray]:
    return {
        "f": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2),
        "s": np.array([f"s{at}" for at in range(rows)], dtype=object),
    }


def read(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.arrow")) for row in pa.ipc.open_file(path).read_all().to_pylist()]


def test_a_row_is_kept_as_it_was(tmp_path: Path) -> None:
    samples, metrics = sampler(tmp_path)
    samples.keep(["a", "b"], [2, 1], feeds(3), np.array([0.1, 0.2, 0.3]), 200)
    samples.keep(["c"], [1], feeds(1), np.array([np.nan]), 500)
    samples.write()
    rows = read(tmp_path)
    assert [(row["request_id"], row["row"], row["status"]) for row in rows] == [
        ("a", 0, 200),
        ("a", 1, 200),
        ("b", 0, 200),
        ("c", 0, 500),
    ]
    assert [(row["in.f.0"], row["in.f.1"], row["in.s"]) for row in rows[:3]] == [
        (0, 1, "s0"),
        (2, 3, "s1"),
        (4, 5, "s2"),
    ]
    assert [row["prediction"] for row in rows[:3]] == [0.1, 0.2, 0.3]
    assert metrics.samples == 4
    assert not list(tmp_path.glob("*.part"))


def test_long_strings_count_towards_the_bound_of_what_waits(tmp_path: Path) -> None:
    samples, metrics = sampler(tmp_path, bytes_max=1_000_000)
    long = {"f": np.zeros((1, 2), np.float32), "s": np.array(["x" * 100_000], dtype=object)}
    for number in range(20):
        samples.keep([f"r{number}"], [1], long, np.array([0.5]), 200)
    samples.write()
    assert 1 <= metrics.samples <= 5
    assert metrics.samples + metrics.samples_dropped == 20


def test_long_ids_count_towards_it_too(tmp_path: Path) -> None:
    """A client names its requests as it likes."""
    samples, metrics = sampler(tmp_path, bytes_max=1_000_000)
    for number in range(40):
        samples.keep([f"{number}".zfill(30_000)], [1], feeds(1), np.zeros(1), 200)
    samples.write()
    assert 1 <= metrics.samples <= 17
    assert metrics.samples + metrics.samples_dropped == 40


def test_of_what_was_not_drawn_by_chance_no_row_is_kept(tmp_path: Path) -> None:
    samples, metrics = sampler(tmp_path)
    samples.keep(["a", UNSAMPLED, "b"], [1, 2, 1], feeds(4), np.array([0.1, 0.2, 0.3, 0.4]), 200)
    samples.write()
    assert [(row["request_id"], row["prediction"]) for row in read(tmp_path)] == [("a", 0.1), ("b", 0.4)]
    assert (metrics.samples, metrics.samples_dropped) == (2, 0)


def test_the_columns_have_the_agreed_types(tmp_path: Path) -> None:
    samples, _ = sampler(tmp_path)
    samples.keep(["a"], [1], feeds(1), np.array([0.1]), 200)
    samples.write()
    (path,) = tmp_path.glob("epoch-*.arrow")
    schema = pa.ipc.open_file(path).schema
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "request_id": "string",
        "row": "int32",
        "time": "double",
        "in.f.0": "float",
        "in.f.1": "float",
        "in.s": "string",
        "prediction": "double",
        "status": "int16",
    }


@given(st.text(max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_one_kept(request_id: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert chosen(request_id, large) or not chosen(request_id, small)


def test_the_share_is_the_share() -> None:
    kept = sum(chosen(f"request-{at}", 0.2) for at in range(20_000))
    assert abs(kept - 4000) < 5 * (20_000 * 0.2 * 0.8) ** 0.5


def test_two_servers_keep_the_rows_of_the_same_requests(tmp_path: Path) -> None:
    """However the requests were batched."""
    ids = [f"r{at}" for at in range(40)]
    one, _ = sampler(tmp_path / "one", share=0.5)
    other, _ = sampler(tmp_path / "other", share=0.5)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    one.keep(ids, [2] * 40, feeds(80), np.zeros(80), 200)
    for request_id in ids:
        other.keep([request_id], [2], feeds(2), np.zeros(2), 200)
    one.write()
    other.write()
    kept = [[(row["request_id"], row["row"]) for row in read(tmp_path / folder)] for folder in ("one", "other")]
    assert kept[0] == kept[1]
    assert 0 < len(kept[0]) < 80


def test_what_is_too_much_is_dropped_and_counted(tmp_path: Path) -> None:
    samples, metrics = sampler(tmp_path, rows_max=10)
    for at in range(4):
        samples.keep([f"r{at}"], [4], feeds(4), np.zeros(4), 200)
    samples.write()
    assert (metrics.samples, metrics.samples_dropped) == (8, 8)
    samples.keep(["next"], [4], feeds(4), np.zeros(4), 200)
    samples.write()
    assert metrics.samples == 12


def test_the_oldest_files_go_when_the_disk_bound_is_reached(tmp_path: Path) -> None:
    samples, _ = sampler(tmp_path, disk_bytes_max=10_000)
    (tmp_path / "killed-000000000.part").write_bytes(bytes(9_000))  # by a server that was killed while it wrote
    for at in range(20):
        samples.keep([f"r{at}"], [1], feeds(1), np.zeros(1), 200)
        samples.write()
    left = sorted(tmp_path.iterdir())
    assert sum(path.stat().st_size for path in left) <= 10_000
    assert left[-1].name == "epoch-000000019.arrow"
    assert 1 < len(left) < 20


def test_a_full_disk_costs_samples_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("where the folder should be")
    samples, metrics = sampler(tmp_path / "file")
    for at in range(3):
        samples.keep([f"r{at}"], [1], feeds(1), np.zeros(1), 200)
        samples.write()
    assert (metrics.samples, metrics.samples_dropped) == (0, 3)
    assert capfd.readouterr().err.count("samples are not kept") == 1


def test_an_input_of_free_or_huge_width_is_left_out(tmp_path: Path) -> None:
    wide = [Tensor("image", BY_NAME["UINT8"], ("N", 224, 224)), Tensor("free", BY_NAME["FP32"], ("N", None))]
    samples, metrics = sampler(tmp_path, wide)
    data = {"image": np.zeros((1, 224, 224), np.uint8), "free": np.zeros((1, 7), np.float32)}
    samples.keep(["a"], [1], data, np.array([0.5]), 200)
    samples.write()
    assert list(read(tmp_path)[0]) == ["request_id", "row", "time", "prediction", "status"]
    assert metrics.samples == 1
