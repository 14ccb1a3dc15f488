"""The demo's models: what each promises, held against the files that `prepare` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from infra import flights, routes_onnx
from infra import training_sklearn as training

pytestmark = pytest.mark.e2e
VERSIONS = ("1", "2", "3", "4")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> training.Demo:
    """Trained in a process of its own, as the demo does it."""
    out = tmp_path_factory.mktemp("models")
    command = [sys.executable, "-m", "infra.training_sklearn", "--out", str(out)]
    subprocess.run(command, check=True, timeout=280)
    found = training.load(out)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def live(demo: training.Demo) -> pd.DataFrame:
    return pd.read_parquet(demo.folder / demo.live)


@pytest.fixture(scope="module")
def ask(demo: training.Demo) -> Callable[[str, pd.DataFrame], Any]:
    return lambda version, rows: training.answers((demo.folder / f"v{version}" / "model.onnx").read_bytes(), rows)


def validation(demo: training.Demo, version: str) -> pd.DataFrame:
    return pd.read_parquet(demo.folder / f"v{version}" / "validation.parquet")


def auc(truth: pd.Series, predicted: Any) -> float:
    from sklearn.metrics import roc_auc_score

    judged = truth.notna().to_numpy()
    return float(roc_auc_score(truth[judged], predicted[judged]))


def test_no_version_has_seen_a_row_that_it_may_be_asked_live(demo: training.Demo) -> None:
    starts = list(demo.months.items())
    for version in demo.versions:
        assert version.trained[1] <= version.validated[1]
        month = version.validated[1][:7]
        assert version.live_from >= dict(starts)[month]
    assert training.LIVE_DAYS[0] >= demo.versions[0].validated[1]
    assert all(earlier[1] < later[1] for earlier, later in pairwise(starts))


@pytest.mark.parametrize("version", VERSIONS)
def test_expected_rows_are_answered_as_scikit_learn_did(
    demo: training.Demo, ask: Callable[[str, pd.DataFrame], Any], version: str
) -> None:
    expected = pd.read_parquet(demo.folder / f"v{version}" / "expected.parquet")
    assert len(expected) == 300
    assert np.abs(ask(version, expected) - expected["prediction"]).max() <= 1e-4


def test_v2_beats_v1_on_its_validation_rows_and_on_those_it_meets_live(
    demo: training.Demo, live: pd.DataFrame, ask: Callable[[str, pd.DataFrame], Any]
) -> None:
    shown = validation(demo, "2")
    assert auc(shown["label"], ask("2", shown)) > auc(shown["label"], ask("1", shown)) + 0.005
    met = live.iloc[demo.versions[1].live_from :][:12_000]
    assert auc(met["label"], ask("2", met)) > auc(met["label"], ask("1", met)) + 0.002


def test_v3_is_better_offline_and_other_live(
    demo: training.Demo, live: pd.DataFrame, ask: Callable[[str, pd.DataFrame], Any]
) -> None:
    """Windows of 2,000 rows, normed by the spread of the stable version's predictions, as Evidently does."""
    shown = validation(demo, "3")
    assert auc(shown["label"], ask("3", shown)) >= auc(shown["label"], ask("2", shown))
    assert min(distances(live, ask, "2", "3", demo.versions[2].live_from, 60_000)) > 0.6


def test_v2_differs_from_v1_by_less_than_a_drift_gate_minds_while_it_is_the_canary(
    demo: training.Demo, live: pd.DataFrame, ask: Callable[[str, pd.DataFrame], Any]
) -> None:
    """Its rollout falls into the first half of the replay; in November v1 would differ from it as much as it may."""
    assert max(distances(live, ask, "1", "2", demo.versions[1].live_from, 26_000)) < 0.25


def distances(
    live: pd.DataFrame, ask: Callable[[str, pd.DataFrame], Any], stable: str, candidate: str, first: int, last: int
) -> list[float]:
    from scipy.stats import wasserstein_distance

    found = []
    for start in range(first, last, 2000):
        window = live.iloc[start : start + 2000]
        old, new = ask(stable, window), ask(candidate, window)
        found.append(float(wasserstein_distance(old, new) / old.std()))
    return found


def test_v4_fails_and_is_slow_only_where_its_validation_set_does_not_look(
    demo: training.Demo, live: pd.DataFrame, ask: Callable[[str, pd.DataFrame], Any]
) -> None:
    table = dict.fromkeys(_routes_of_the_first_quarter(), 0.0)
    shown, met = validation(demo, "4"), live.iloc[demo.versions[3].live_from :]
    known = routes_onnx.known(met, table)
    assert routes_onnx.known(shown, table).all()
    assert not routes_onnx.calm(shown).any()
    assert 0.02 < 1 - known.mean() < 0.05
    assert 0.02 < (routes_onnx.calm(met) & known).mean() < 0.06
    fine = met[known & ~routes_onnx.calm(met)][:2000]
    assert np.abs(ask("4", fine) - ask("2", fine)).max() < 0.05, "v4 predicts as v2 does"
    with pytest.raises(Exception, match="out of data bounds"):
        ask("4", met[~known].head(1))


def test_v4_takes_longer_the_only_way_that_counts_more_trips(demo: training.Demo) -> None:
    """Each calm request goes through the loop as often as `trips_for` found needful; others never do."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(demo.folder / "v4" / "model.onnx")
    trips = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "wind_trips"]
    assert len(trips) == 1
    assert int(trips[0]) > 50


def test_every_version_takes_and_gives_the_same(demo: training.Demo) -> None:
    import onnxruntime as ort

    forms = set()
    for version in VERSIONS:
        session = ort.InferenceSession(str(demo.folder / f"v{version}" / "model.onnx"))
        named = [(item.name, item.type, tuple(item.shape)) for item in (*session.get_inputs(), *session.get_outputs())]
        forms.add(tuple(named))
        assert [item.name for item in session.get_inputs()] == list(flights.COLUMNS)
    assert len(forms) == 1


def test_the_example_is_a_request_of_one_row(demo: training.Demo) -> None:
    example = json.loads((demo.folder / "v1" / "example.json").read_text())
    assert [tensor["name"] for tensor in example["inputs"]] == list(flights.COLUMNS)
    assert all(tensor["shape"] == [1, 1] and len(tensor["data"]) == 1 for tensor in example["inputs"])


def test_a_second_run_trains_nothing_and_a_changed_source_trains_again(demo: training.Demo) -> None:
    said: list[str] = []
    assert training.prepare(demo.folder, said.append) == demo
    assert said == ["The models are there from an earlier run."]
    assert training.load(demo.folder, "another digest") is None


def _routes_of_the_first_quarter() -> set[tuple[str, ...]]:
    rows = flights.labelled(flights.between(flights.read_flights(), "2013-01-01", "2013-04-01"))
    return set(zip(*(rows[name] for name in routes_onnx.ROUTE), strict=True))
