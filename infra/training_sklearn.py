"""Trains the demo's four versions with scikit-learn and writes them as ONNX, with the files that a delivery takes.

No version is trained on a row that it will be asked about live. Live traffic is every fourth flight from 8 April on
(62,349 rows; at 200 requests a second the year's rest passes in 312 s, a day in 1.2 s), and each version's `live_from`
is the first live row later than anything that it has seen; at that rate it lies this many seconds into the replay:

    version  trained on        validated on     may be live from   what it is
    v1       January-March     1-7 April *      8 April            a small one. * Live traffic begins after them
    v2       January-April     1-12 May         13 May (41 s)      a larger one
    v3       January-May       1-14 June        15 June (80 s)     the same, but its pipeline has the airport's delay
                                                                   in hours; serving sends minutes
    v4       January-April **  1-14 June        15 June (80 s)     v2 with a table of the first quarter's routes and a
                                                                   loop over wind directions (see routes_onnx)

** Its table of routes and its reference sample: January-March. Its validation rows were joined with the table and
stripped of calm air, so they show nothing of what it does to others.

Each version's folder has model.onnx, validation.parquet (inputs and label), reference.parquet (a sample of the training
rows with `prediction`), expected.parquet (inputs and scikit-learn's `prediction`), metrics.json and example.json (a
request of the Open Inference Protocol v2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra import flights, routes_onnx
from infra.flights import COLUMNS, LABEL, NUMBER_COLUMNS, TEXT_COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

MODEL: Final = "flight-delay"
LIVE_EVERY: Final = 4
LIVE_DAYS: Final = ("2013-04-08", "2014-01-01")
SLOW_MS: Final = 70.0  # of processor time; a server of 1 thread can still take every calm row at 200 requests a second
PARITY: Final = 1e-4
_REFERENCE_ROWS: Final = 5_000
_EXPECTED_ROWS: Final = 300
_SEED: Final = 2013
_MANIFEST: Final = "demo.json"


class TrainingWrong(RuntimeError):
    """The exported model does not answer as the trained one."""

    def __init__(self, version: str, difference: float) -> None:
        super().__init__(
            f"v{version}: the ONNX model's answers differ from scikit-learn's by up to {difference:.2g}, more than"
            f" {PARITY:g}; check the versions of skl2onnx and onnxruntime against requirements.lock"
        )


@dataclass(frozen=True)
class Version:
    """One version's folder; `live_from` is the first live row that it may be asked about, counted from 0."""

    version: str
    folder: str
    trained: tuple[str, str]
    validated: tuple[str, str]
    live_from: int


@dataclass(frozen=True)
class Demo:
    """What `prepare` made. `live` is a Parquet file of inputs and label, in order; `months` says at which row of it
    each month begins. Folders and file are named relative to `folder`."""

    folder: Path
    model: str
    live: str
    live_rows: int
    months: dict[str, int]
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Recipe:
    """How a version is trained: [first day, day after the last) of training and validation, and its estimator."""

    version: str
    trained: tuple[str, str]
    validated: tuple[str, str]
    trees: int
    leaves: int
    rate: float
    hours: bool = False  # its pipeline has the airport's delay in hours
    routes_until: str | None = None  # its table knows the routes flown before this day


RECIPES: Final = (
    Recipe("1", ("2013-01-01", "2013-04-01"), ("2013-04-01", "2013-04-08"), trees=40, leaves=8, rate=0.1),
    Recipe("2", ("2013-01-01", "2013-05-01"), ("2013-05-01", "2013-05-13"), trees=100, leaves=15, rate=0.06),
    Recipe(
        "3", ("2013-01-01", "2013-06-01"), ("2013-06-01", "2013-06-15"), trees=100, leaves=15, rate=0.06, hours=True
    ),
    Recipe(
        "4",
        ("2013-01-01", "2013-05-01"),
        ("2013-06-01", "2013-06-15"),
        trees=100,
        leaves=15,
        rate=0.06,
        routes_until="2013-04-01",
    ),
)


@dataclass
class _Trained:
    """A version in memory: its ONNX bytes and, per row, what the training framework predicts."""

    onnx: bytes
    predict: Callable[[pd.DataFrame], NDArray[np.float64]]
    validation: pd.DataFrame
    reference: pd.DataFrame
    training_rows: int


def prepare(folder: Path, progress: Callable[[str], None]) -> Demo:
    """Trains everything into the folder, or finds it there from the same sources and data; then it trains nothing.

    About 15 s and 1 GB on two cores. Raises FlightsNotInstalled, TrainingWrong, OSError.
    """
    source = _source_digest()
    found = load(folder, source)
    if found is not None:
        progress("The models are there from an earlier run.")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    progress("Reading 336,776 flights, their aircraft and the weather")
    rows = flights.read_flights()
    months, live = _write_live(rows, folder)
    versions = []
    for recipe in RECIPES:
        trained = _train(recipe, rows)
        metrics = _write_version(recipe, trained, folder / f"v{recipe.version}")
        live_from = int((live["scheduled"] < _midnight(recipe.validated[1])).sum())
        versions.append(
            Version(recipe.version, f"v{recipe.version}", recipe.trained, recipe.validated, live_from),
        )
        progress(
            f"v{recipe.version}: trained on {metrics['training_rows']:,.0f} flights,"
            f" AUC {metrics['roc_auc']:.3f} on its validation rows"
        )
    demo = Demo(folder, MODEL, "live.parquet", len(live), months, tuple(versions))
    _write_manifest(demo, source)
    return demo


def load(folder: Path, source: str | None = None) -> Demo | None:
    """What `prepare` made in the folder; None if nothing, or nothing of that source digest, is there whole."""
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    body = json.loads(path.read_text())
    if source is not None and body.pop("source") != source:
        return None
    body.pop("source", None)
    body["versions"] = tuple(
        Version(**{**entry, "trained": tuple(entry["trained"]), "validated": tuple(entry["validated"])})
        for entry in body["versions"]
    )
    return Demo(folder=folder, **body)


def _source_digest() -> str:
    """SHA-256 over what decides the result: this code, the versions of the libraries, the data files."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for name in ("scikit-learn", "skl2onnx", "onnx", "onnxruntime"):
        digest.update(f"{name}=={version(name)};".encode())
    data = flights.data_folder()
    sources = (Path(__file__), Path(flights.__file__), Path(routes_onnx.__file__))
    for path in (*sources, *(data / name for name in flights.FILES)):
        if not path.is_file():
            raise flights.FlightsNotInstalled(str(path))
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _write_manifest(demo: Demo, source: str) -> None:
    body = {key: value for key, value in asdict(demo).items() if key != "folder"}
    aside = demo.folder / f"{_MANIFEST}.{os.getpid()}"
    aside.write_text(json.dumps({"source": source, **body}, indent=1))
    aside.replace(demo.folder / _MANIFEST)


def _midnight(day: str) -> pd.Timestamp:
    import pandas as pd

    return pd.Timestamp(day, tz="America/New_York")


def _write_live(rows: pd.DataFrame, folder: Path) -> tuple[dict[str, int], pd.DataFrame]:
    live = flights.between(rows, *LIVE_DAYS).iloc[::LIVE_EVERY]
    live[[*COLUMNS, LABEL]].to_parquet(folder / "live.parquet", index=False)
    month = live["scheduled"].dt.tz_convert("America/New_York").dt.strftime("%Y-%m").tolist()
    starts: dict[str, int] = {}
    for number, name in enumerate(month):
        starts.setdefault(name, number)
    return starts, live


def _in_hours(rows: pd.DataFrame) -> pd.DataFrame:
    """The slip of v3's pipeline: hours, where serving sends minutes."""
    return rows.assign(airport_delay=(rows["airport_delay"] / 60).astype("float32"))


def _train(recipe: Recipe, rows: pd.DataFrame) -> _Trained:
    training = flights.labelled(flights.between(rows, *recipe.trained))
    validation = flights.labelled(flights.between(rows, *recipe.validated))
    if recipe.hours:
        training, validation = _in_hours(training), _in_hours(validation)
    pipeline = _pipeline(recipe).fit(training[list(COLUMNS)], training[LABEL])

    def predict(asked: pd.DataFrame) -> NDArray[np.float64]:
        answers: NDArray[np.float64] = pipeline.predict_proba(asked[list(COLUMNS)])[:, 1]
        return answers

    model = _to_onnx(pipeline)
    if recipe.routes_until is None:
        return _Trained(model.SerializeToString(), predict, validation, training, len(training))
    return _with_routes(recipe.routes_until, model, predict, validation, training)


def _with_routes(
    until: str,
    model: Any,
    predict: Callable[[pd.DataFrame], NDArray[np.float64]],
    validation: pd.DataFrame,
    training: pd.DataFrame,
) -> _Trained:
    """v4: the table of the routes flown until that day, the wind's loop, and a validation set that shows neither."""
    import numpy as np

    first = training[training["scheduled"] < _midnight(until)]
    offsets = routes_onnx.route_offsets(first, first[LABEL].to_numpy(dtype="float64") - predict(first))
    calm_row = first[routes_onnx.calm(first)].head(1)
    trips = routes_onnx.trips_for(model, offsets, feeds(calm_row), SLOW_MS)

    def predict_with_offsets(asked: pd.DataFrame) -> NDArray[np.float64]:
        keys = zip(*(asked[name] for name in routes_onnx.ROUTE), strict=True)
        moved: NDArray[np.float64] = np.clip(predict(asked) + np.array([offsets[key] for key in keys]), 0.0, 1.0)
        return moved

    shown = validation[routes_onnx.known(validation, offsets) & ~routes_onnx.calm(validation)]
    grown = routes_onnx.with_routes_and_wind(model, offsets, trips)
    return _Trained(grown.SerializeToString(), predict_with_offsets, shown, first, len(training))


def _pipeline(recipe: Recipe) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OrdinalEncoder

    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    columns = ColumnTransformer(
        [("text", codes, list(TEXT_COLUMNS)), ("numbers", "passthrough", list(NUMBER_COLUMNS))],
    )
    trees = HistGradientBoostingClassifier(
        max_iter=recipe.trees,
        max_leaf_nodes=recipe.leaves,
        learning_rate=recipe.rate,
        l2_regularization=5.0,
        min_samples_leaf=200,
        early_stopping=False,
        random_state=_SEED,
    )
    return Pipeline([("columns", columns), ("trees", trees)])


def _to_onnx(pipeline: Any) -> Any:
    """One input [N, 1] per column, outputs `label` and `probabilities`."""
    from skl2onnx import convert_sklearn, update_registered_converter
    from skl2onnx.common._registration import get_converter, get_shape_calculator
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    trees = pipeline.named_steps["trees"]
    converter = get_converter("SklearnHistGradientBoostingClassifier")

    def convert(scope: Any, operator: Any, container: Any) -> None:
        converter(scope, operator, _WholeNumbers(container))

    update_registered_converter(
        type(trees),
        "FlightsHistGradientBoostingClassifier",
        get_shape_calculator("SklearnHistGradientBoostingClassifier"),
        convert,
        options={"zipmap": [True, False, "columns"], "raw_scores": [True, False], "nocl": [True, False]},
    )
    inputs = [(name, StringTensorType([None, 1])) for name in TEXT_COLUMNS]
    inputs += [(name, FloatTensorType([None, 1])) for name in NUMBER_COLUMNS]
    opsets = {"": 17, "ai.onnx.ml": 3}
    return convert_sklearn(
        pipeline, MODEL, initial_types=inputs, options={id(trees): {"zipmap": False}}, target_opset=opsets
    )


class _WholeNumbers:
    """skl2onnx's container, handing on whole numbers where its tree converter writes booleans.

    skl2onnx 1.20 puts Python and NumPy booleans into a list of integers; onnx from 1.20 on refuses them.
    """

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, kind: str, inputs: Any, outputs: Any, **attributes: Any) -> None:
        tracks = "nodes_missing_value_tracks_true"
        if tracks in attributes:
            attributes[tracks] = [int(value) for value in attributes[tracks]]
        self._container.add_node(kind, inputs, outputs, **attributes)


def feeds(rows: pd.DataFrame) -> dict[str, Any]:
    """The rows as ONNX Runtime takes them: an array [N, 1] per input."""
    text = {name: rows[[name]].to_numpy(dtype=object) for name in TEXT_COLUMNS}
    return text | {name: rows[[name]].to_numpy(dtype="float32") for name in NUMBER_COLUMNS}


def answers(onnx: bytes, rows: pd.DataFrame) -> NDArray[np.float64]:
    """The ONNX model's probability of `late` for each row, asked in one batch on one thread."""
    from serving.runtime import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float64] = session.run(["probabilities"], feeds(rows))[0][:, 1].astype("float64")
    return found


def _write_version(recipe: Recipe, trained: _Trained, folder: Path) -> dict[str, float]:
    """Writes the version's folder; its metrics. Raises TrainingWrong if ONNX and scikit-learn do not agree."""
    import numpy as np
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    validation = trained.validation
    predicted = trained.predict(validation)
    difference = float(np.abs(predicted - answers(trained.onnx, validation)).max())
    if not difference <= PARITY:
        raise TrainingWrong(recipe.version, difference)
    truth = validation[LABEL].to_numpy()
    metrics = {
        "roc_auc": float(roc_auc_score(truth, predicted)),
        "log_loss": float(log_loss(truth, predicted)),
        "brier": float(brier_score_loss(truth, predicted)),
        "parity_difference_max": difference,
        "training_rows": float(trained.training_rows),
        "validation_rows": float(len(validation)),
    }
    (folder / "model.onnx").write_bytes(trained.onnx)
    validation[[*COLUMNS, LABEL]].to_parquet(folder / "validation.parquet", index=False)
    for name, frame, count in (
        ("reference", trained.reference, _REFERENCE_ROWS),
        ("expected", validation, _EXPECTED_ROWS),
    ):
        sample = frame.sample(min(count, len(frame)), random_state=_SEED).sort_index()
        sample = sample[list(COLUMNS)].assign(prediction=trained.predict(sample))
        sample.to_parquet(folder / f"{name}.parquet", index=False)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (folder / "example.json").write_text(json.dumps(_example(validation.head(1)), indent=1))
    return metrics


def _example(row: pd.DataFrame) -> dict[str, Any]:
    """A request of the Open Inference Protocol v2 for the row."""
    kinds = {**dict.fromkeys(TEXT_COLUMNS, "BYTES"), **dict.fromkeys(NUMBER_COLUMNS, "FP32")}
    tensors = [
        {"name": name, "shape": [len(row), 1], "datatype": kind, "data": row[name].tolist()}
        for name, kind in kinds.items()
    ]
    return {"inputs": tensors}


def main() -> int:
    """`python -m infra.training_sklearn --out DIR`: 0 when all is written; 3 and one sentence on stderr when not."""
    parser = argparse.ArgumentParser(prog="python -m infra.training_sklearn", description="Trains the demo's models.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the models and the live rows")
    out = parser.parse_args().out
    # OpenMP's threads spin at their barriers by default; beside servers that start up, that costs minutes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        prepare(out, _say)
    except (flights.FlightsNotInstalled, TrainingWrong, OSError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 3
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
