"""Recorded traffic answered anew: by a candidate's bytes, on what the servers sampled or on a file of rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.drift_evidently import EvidentlyDrift
from infra.inspector_onnx import OnnxInspector
from infra.recording_arrow import ArrowRecordings, Candidate
from policies import shifts
from policies.evidence import Drift
from policies.policy_yaml import parse
from policies.rehearsal import rehearse
from tasks.ports import NotThere, PortError
from tests.infra.onnx_models import logistic, save
from tests.infra.test_windows_arrow import sampled
from tests.serving import models

POLICY = parse("policy: p\nrollout: {stages: [shadow: {share: 1.0, for: 1s}, canary: {weight: 50, for: 1s}]}\n")


def candidate(path: Path, model: Any) -> Candidate:
    save(model, path)
    return Candidate.of_file(path, OnnxInspector().signature(path))


def recordings(home: Path) -> ArrowRecordings:
    return ArrowRecordings(home, None)  # type: ignore[arg-type]  # no drift gate, so nothing is compared


def test_the_sampled_inputs_are_put_to_the_candidate(tmp_path: Path) -> None:
    now = time.time()
    sampled(tmp_path, 400, at=now - 60.0)
    sampled(tmp_path, 100, at=now - 50.0, status=500, seed=2)
    seen, _ = recordings(tmp_path).sampled(POLICY, "m", "1", candidate(tmp_path / "same.onnx", logistic()), 1.0)
    assert len(seen.at) == 500
    assert seen.stable_failed.sum() == np.isnan(seen.stable).sum() == 100, "what the stable version failed on is told"
    np.testing.assert_allclose(seen.candidate[:400], seen.stable[:400], atol=1e-5)
    assert len(np.unique(seen.lots)) == 250, "the rows of one request meet the same version"
    other = candidate(tmp_path / "other.onnx", logistic((-1.0, 1.0)))
    seen, _ = recordings(tmp_path).sampled(POLICY, "m", "1", other, 1.0)
    np.testing.assert_allclose(seen.candidate[:400], 1.0 - seen.stable[:400], atol=1e-5)


def test_without_samples_or_with_others_it_says_so(tmp_path: Path) -> None:
    same = candidate(tmp_path / "same.onnx", logistic())
    with pytest.raises(NotThere, match="no sampled row of the last 1 h"):
        recordings(tmp_path).sampled(POLICY, "m", "1", same, 1.0)
    sampled(tmp_path, 10, at=time.time() - 5.0)
    models.score(tmp_path / "wide.onnx")
    wide = Candidate.of_file(tmp_path / "wide.onnx", OnnxInspector().signature(tmp_path / "wide.onnx"))
    with pytest.raises(PortError, match="do not hold the input 'f'"):
        recordings(tmp_path).sampled(POLICY, "m", "1", wide, 1.0)


def test_a_file_s_rows_are_answered_by_both_and_a_row_that_fails_is_a_failure(tmp_path: Path) -> None:
    picky = tmp_path / "picky.onnx"
    models.picky(picky)
    bytes_ = Candidate.of_file(picky, OnnxInspector().signature(picky))
    pq.write_table(pa.table({"i": [0, 1, 2, 3, 9] * 40}), tmp_path / "rows.parquet")
    policy = parse(POLICY.model_dump_json(by_alias=True))
    policy = policy.model_copy(update={"prediction": policy.prediction.model_copy(update={"output": "o"})})
    seen, compare = recordings(tmp_path).in_file(policy, tmp_path / "rows.parquet", 50.0, bytes_, bytes_)
    assert seen.candidate_failed.mean() == np.isnan(seen.candidate).mean() == 0.2
    assert seen.candidate[:4].tolist() == [10.0, 20.0, 30.0, 40.0]
    assert seen.at[-1] == pytest.approx(199 / 50)
    assert rehearse(policy, "m", "2", "1", seen, compare).outcome in ("rolled_back", "unfinished")


class Windows(EvidentlyDrift):
    """Keeps the column `i` of the windows that it is asked to compare, and compares nothing."""

    def compare(self, reference: pa.Table, current: pa.Table, *_: Any, **__: Any) -> Drift:
        self.seen = [table["i"].to_pylist() for table in (reference, current)]
        return Drift(reference.num_rows, current.num_rows, (), 1.0)


def test_the_windows_are_of_the_same_time_whatever_the_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifts, "WINDOW_ROWS", 100)
    models.picky(tmp_path / "picky.onnx")
    bytes_ = Candidate.of_file(tmp_path / "picky.onnx", OnnxInspector().signature(tmp_path / "picky.onnx"))
    pq.write_table(pa.table({"i": range(4000)}), tmp_path / "rows.parquet")
    policy = parse(
        "policy: p\nprediction: {output: o}\nrollout:\n  stages: [canary: {weight: 5, for: 1s}]\n"
        "  gates: {drift: {columns: [i]}}\n"
    )
    windows = Windows()
    _, compare = ArrowRecordings(tmp_path, windows).in_file(policy, tmp_path / "rows.parquet", 50.0, bytes_, bytes_)
    numbers = np.arange(4000)
    compare(numbers[numbers % 20 > 0], numbers[numbers % 20 == 0])
    assert [min(seen) for seen in windows.seen] == pytest.approx([2000, 2000], abs=40)
    assert [max(seen) for seen in windows.seen] == pytest.approx([3990, 3990], abs=40)
    assert compare(numbers[:0], numbers[:0]) == Drift(0, 0, (), 1.0)
