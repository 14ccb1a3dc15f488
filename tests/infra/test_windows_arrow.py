"""A period's rows beside the rows that the version was made with: the same columns, halves that share no request, the
version's own predictions on both sides."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import scores_onnx
from infra.inspector_onnx import OnnxInspector
from infra.labels_arrow import LabelStore
from infra.registry_mlflow import sha256_of
from infra.windows_arrow import SampledWindows
from policies.evidence import Sums
from tasks.ports import BadInput, Bundle, ModelVersion, NotThere
from tasks.ports_monitor import Chosen
from tests.infra.onnx_models import logistic, save

SINCE = 1_000.0


def sampled(home: Path, count: int, at: float = SINCE, status: int = 200, shift: float = 0.0, seed: int = 1) -> None:
    """Requests of two rows each, as the model server writes them."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 2)).astype(np.float32) + np.float32(shift)
    folder = home / "samples" / "m" / "1"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "request_id": [f"{seed}-{i // 2}" for i in range(count)],
            "row": pa.array([i % 2 for i in range(count)], pa.int32()),
            "time": at + np.arange(count) / 1000,
            "in.x.0": x[:, 0],
            "in.x.1": x[:, 1],
            "prediction": 1 / (1 + np.exp(-(x[:, 0].astype(float) - x[:, 1]))),
            "status": pa.array([status] * count, pa.int16()),
        }
    )
    with pa.OSFile(str(folder / f"{seed}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def version(tmp_path: Path) -> tuple[ModelVersion, Bundle]:
    onnx = save(logistic(), tmp_path / "model.onnx")
    generator = np.random.default_rng(0)
    rows = {name: generator.normal(size=900) for name in ("age", "income")}
    pq.write_table(pa.table(rows), tmp_path / "reference.parquet")
    labelled = {**rows, "label": (rows["age"] > 0).astype(int)}
    pq.write_table(pa.table(labelled), tmp_path / "validation.parquet")
    made = ModelVersion("m", "1", sha256_of(onnx), OnnxInspector().signature(onnx), "run")
    return made, Bundle(onnx, tmp_path / "validation.parquet", tmp_path / "reference.parquet")


def written(path: Path) -> pa.Table:
    return pq.read_table(path)


def test_live_and_reference_rows_have_the_same_columns_under_the_reference_s_names(
    version: tuple[ModelVersion, Bundle], tmp_path: Path
) -> None:
    sampled(tmp_path, 600)
    window = SampledWindows(tmp_path).write(*version, Chosen(), SINCE, SINCE + 60, tmp_path / "out")
    live, reference = written(window.live), written(window.reference)
    assert live.column_names == reference.column_names == ["age", "income", "prediction"]
    assert (window.live_rows, window.reference_rows, window.numbers, window.texts) == (600, 900, ("age", "income"), ())
    assert window.reference_name == "training rows"
    for table in (live, reference):
        seen = {name: table[name].to_numpy().astype(float) for name in table.column_names}
        expected = 1 / (1 + np.exp(-(seen["age"] - seen["income"])))
        np.testing.assert_allclose(seen["prediction"], expected, atol=1e-6)
    assert live.schema.types[:2] == reference.schema.types[:2]


def test_halves_part_no_request_and_are_the_same_each_time(
    version: tuple[ModelVersion, Bundle], tmp_path: Path
) -> None:
    sampled(tmp_path, 600)
    windows = SampledWindows(tmp_path)
    first, again = (windows.write(*version, Chosen(), SINCE, SINCE + 60, tmp_path / each) for each in ("a", "b"))
    assert written(first.live).equals(written(again.live))
    assert written(first.reference).equals(written(again.reference))
    assert 200 < first.live_half < 400
    assert first.live_half % 2 == 0
    whole = written(first.live)["age"].to_pylist()
    own = {f"1-{i}" for i in range(300) if not zlib.crc32(f"1-{i}".encode()) >> 7 & 1}
    assert first.live_half == 2 * len(own)
    assert len(set(whole[: first.live_half]) & set(whole[first.live_half :])) == 0


def test_only_answered_rows_of_the_period_count(version: tuple[ModelVersion, Bundle], tmp_path: Path) -> None:
    sampled(tmp_path, 100, at=SINCE - 50, seed=1)
    sampled(tmp_path, 200, at=SINCE, seed=2)
    sampled(tmp_path, 300, at=SINCE + 60, seed=3)
    sampled(tmp_path, 400, at=SINCE, status=500, seed=4)
    window = SampledWindows(tmp_path).write(*version, Chosen(), SINCE, SINCE + 60, tmp_path / "out")
    assert window.live_rows == 200
    with pytest.raises(NotThere, match="v1 has no sampled row of this period"):
        SampledWindows(tmp_path).write(*version, Chosen(), SINCE - 900, SINCE - 600, tmp_path / "none")


def test_without_training_rows_the_validation_rows_are_the_reference_and_without_those_there_is_none(
    version: tuple[ModelVersion, Bundle], tmp_path: Path
) -> None:
    sampled(tmp_path, 600)
    made, bundle = version
    window = SampledWindows(tmp_path).write(
        made, replace(bundle, reference=None), Chosen(), SINCE, SINCE + 60, tmp_path
    )
    assert window.reference_name == "validation rows"
    assert window.numbers == ("age", "income")
    with pytest.raises(NotThere, match="--reference"):
        SampledWindows(tmp_path).write(made, Bundle(bundle.onnx), Chosen(), SINCE, SINCE + 60, tmp_path)


def test_the_validation_rows_say_what_the_loss_was(version: tuple[ModelVersion, Bundle], tmp_path: Path) -> None:
    sampled(tmp_path, 600)
    windows = SampledWindows(tmp_path)
    window = windows.write(*version, Chosen(), SINCE, SINCE + 60, tmp_path)
    assert window.known is not None
    scores, truth = (np.array(each) for each in window.known)
    sums = windows.known_losses(window, "brier")
    assert (sums.n, sums.mean) == (900, pytest.approx(float(np.mean((scores - truth) ** 2))))
    made, bundle = version
    unlabelled = windows.write(
        made, replace(bundle, validation=bundle.reference), Chosen(), SINCE, SINCE + 60, tmp_path / "unlabelled"
    )
    assert unlabelled.known is None
    assert windows.known_losses(unlabelled, "brier") == Sums()


def test_labels_count_in_the_period_in_which_they_came(
    version: tuple[ModelVersion, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled(tmp_path, 8)
    file = tmp_path / "labels.csv"
    file.write_text("request_id,row,label\n1-0,0,1\n1-0,1,1\n1-1,0,0\nelsewhere,0,1\n")
    monkeypatch.setattr("time.time", lambda: SINCE + 100)
    LabelStore(tmp_path).add("m", file)
    windows, made = SampledWindows(tmp_path), version[0]
    table = pa.ipc.open_file(tmp_path / "samples/m/1/1.arrow").read_all()
    p = table["prediction"].to_pylist()
    sums, unlabelled = windows.losses(made, "brier", SINCE + 50, SINCE + 150, 500.0)
    assert sums.n == 2  # the rows of one request are one observation
    assert sums.total == pytest.approx(((1 - p[0]) ** 2 + (1 - p[1]) ** 2) / 2 + p[2] ** 2)
    assert unlabelled == 2
    assert windows.losses(made, "brier", SINCE + 150, SINCE + 250, 500.0)[0].n == 0
    assert windows.losses(made, "brier", SINCE + 50, SINCE + 150, 60.0)[0].n == 0


def test_other_bytes_than_the_version_s_are_not_run(version: tuple[ModelVersion, Bundle]) -> None:
    made, bundle = version
    feeds = {"x": np.zeros((3, 2), np.float32)}
    assert scores_onnx.predictions(bundle.onnx, made.digest, feeds, None, -1).tolist() == [0.5] * 3
    with pytest.raises(BadInput, match="SHA-256"):
        scores_onnx.predictions(bundle.onnx, "0" * 64, feeds, None, -1)
    with pytest.raises(BadInput, match="no output 'q'"):
        scores_onnx.predictions(bundle.onnx, made.digest, feeds, "q", -1)


def test_labels_of_answers_that_are_too_old_to_be_read_are_said_not_to_count(
    version: tuple[ModelVersion, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.windows_arrow._ANSWERS_MAX", 4)
    monkeypatch.setattr("time.time", lambda: SINCE + 100)
    sampled(tmp_path, 8)
    file = tmp_path / "labels.csv"
    file.write_text("request_id,row,label\n1-0,0,1\n")
    LabelStore(tmp_path).add("m", file)
    windows, made = SampledWindows(tmp_path), version[0]
    with pytest.raises(NotThere, match="the 1 labels that came are of none of the newest 4 answers"):
        windows.losses(made, "brier", SINCE + 50, SINCE + 150, 500.0)
    assert windows.losses(made, "brier", SINCE + 150, SINCE + 250, 500.0)[0].n == 0
    file.write_text("request_id,row,label\n1-3,0,1\n")
    LabelStore(tmp_path).add("m", file)
    assert windows.losses(made, "brier", SINCE + 50, SINCE + 150, 500.0)[0].n == 1
