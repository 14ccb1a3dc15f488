"""Registry on an MLflow tracking and registry server.

What a version is made of:
- a run in the experiment `lockgate/<model>` with the model as an `mlflow.onnx` model under `model/` (so that plain
  MLflow clients load it), its `model.onnx` being the registered bytes themselves, not MLflow's re-serialisation of
  them; and the files of the submission under `lockgate/`;
- a model version that points there, with the tags `lockgate.` `digest`, `signature`, `artifacts`, `run`, `source` and
  `file.<kind>`.

A version that somebody else registered is adopted when it is first asked for: its bytes are read, digested and kept in
a run of our own, and the tags are set. The version is created last and with its tags, so that none is ever half there.

Nothing is told to MLflow's makers. Every call is bounded in time; what goes wrong is mapped by `errors_mlflow`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from infra import errors_mlflow, rows
from infra.inspector_onnx import OnnxInspector, single_file
from infra.model_mlflow import onnx_within, save_model
from tasks.ports import (
    SIGNED_TAG,
    BadInput,
    Bundle,
    Inspector,
    Listed,
    ModelVersion,
    NotThere,
    Refused,
    Registered,
    Signature,
    Submission,
    Tensor,
)

TAG = "lockgate."
KINDS = ("validation", "reference", "expected")
# A connection that is refused or hangs is told within seconds; Prefect's retries are the ones that wait.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "120",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is the command line's
    "GIT_PYTHON_REFRESH": "quiet",
}
_VERSION_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))$")
_RUN_URI = re.compile(r"^runs:/(?P<run>[^/]+)/(?P<path>.+)$")
_NAME = re.compile(r"^[^/:'\"]+$")


def sha256_of(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _vendor() -> Any:
    """MLflow, imported at first use with telemetry off and its waits bounded (what the environment says goes first)."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.onnx

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # its "waiting for creation" and "pip not found" are no news
    return mlflow


class MlflowRegistry:
    """`tasks.ports.Registry` on the server at `uri`; files are kept in `cache`, by digest, once fetched."""

    def __init__(self, uri: str, cache: Path, inspector: Inspector | None = None) -> None:
        self._uri = uri.rstrip("/")
        self._cache = cache
        self._inspector = inspector or OnnxInspector()

    @cached_property
    def _client(self) -> Any:
        return _vendor().MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    # -- the port

    def register(self, submission: Submission) -> ModelVersion:
        """The version with the submission's bytes; a new one only if no version of the model has their digest.

        Files given for bytes that are registered already replace those kept with them.
        """
        _check_name(submission.model)
        files = _files(submission)
        with self._asking(f"register {submission.source} as '{submission.model}'"), self._workplace() as work:
            onnx, adopted = self._obtain(submission, work)
            signature = self._inspector.signature(onnx)
            _check_expected(files, signature)
            digest = sha256_of(onnx)
            known = self._with_digest(submission.model, digest)
            if known is not None:
                self._keep(known.run_id, submission, files)
                for name, value in _tags_of(submission, files).items():
                    self._client.set_model_version_tag(known.model, known.version, name, value)
                return self.version(known.model, known.version)
            tags = self._store(submission, files, onnx, signature, digest, work)
            if adopted is not None:
                return self._tagged(submission.model, adopted, tags)
            return self._create(submission.model, tags)

    def version(self, model: str, version: str) -> ModelVersion:
        """The version; one that somebody else registered is adopted first. Raises NotThere."""
        if not version.isdigit():
            raise NotThere(f"'{version}' is no version of '{model}': versions are numbers")
        with self._asking(f"read version {version} of '{model}'"):
            found = self._client.get_model_version(model, version)
        if TAG + "digest" in found.tags:
            return _version(found)
        return self.register(Submission(model=model, source=f"models:/{model}/{version}"))

    def by_alias(self, model: str, alias: str) -> ModelVersion | None:
        """The version that the alias names, if any. Raises NotThere for an unknown model."""
        with self._asking(f"read alias '{alias}' of '{model}'"):
            number = self._client.get_registered_model(model).aliases.get(alias)
        return None if number is None else self.version(model, str(number))

    def versions(self, model: str) -> Sequence[ModelVersion]:
        """All versions of the model that are ours or adopted, oldest first; none for an unknown model."""
        found = [_version(entry) for entry in self._all(model) if TAG + "digest" in entry.tags]
        return sorted(found, key=lambda version: int(version.version))

    def models(self) -> Sequence[Registered]:
        """All models, with their aliases."""
        with self._asking("list the models"):
            found, token = [], None
            while True:  # ends: the server hands out each page once
                page = self._client.search_registered_models(max_results=1000, page_token=token)
                for each in page:
                    said = [_listed(version) for version in each.latest_versions]
                    found.append(Registered(each.name, dict(each.tags), _aliases(each), said))
                token = page.token
                if not token:
                    return found

    def listed(self, model: str) -> Sequence[Listed]:
        """All versions of the model, oldest first, whoever registered them; none for an unknown model."""
        return sorted(map(_listed, self._all(model)), key=lambda version: int(version.version))

    def fetch(self, version: ModelVersion) -> Bundle:
        """The version's files, digest checked; from the cache where they are there. Raises Refused for other bytes."""
        tags = version.tags if TAG + "artifacts" in version.tags else self.version(version.model, version.version).tags
        root = tags[TAG + "artifacts"]
        what = f"'{version.model}' version {version.version}"
        with self._asking(f"fetch {what}"):
            kept: dict[str, Path] = {}
            for kind in KINDS:
                if name_and_digest := tags.get(f"{TAG}file.{kind}"):
                    name, digest = name_and_digest.split()
                    kept[kind] = self._cached(f"{root}/lockgate/{name}", digest, Path(name).suffix, f"{name} of {what}")
            onnx = self._cached(f"{root}/model/model.onnx", version.digest, ".onnx", f"model.onnx of {what}")
        return Bundle(onnx=onnx, **kept)

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        """The alias names the version from now on, or nothing with None. Idempotent."""
        with self._asking(f"set alias '{alias}' of '{model}' to {version or 'nothing'}"):
            if version is None:
                self._client.delete_registered_model_alias(model, alias)
            else:
                self._client.set_registered_model_alias(model, alias, version)

    def drop_alias(self, model: str, alias: str, version: str) -> None:
        """The alias names the version no more; one that names another by now is left alone. Idempotent.

        MLflow cannot compare and set: an alias moved within the milliseconds between the look and the deletion is lost.
        """
        with self._asking(f"take alias '{alias}' off version {version} of '{model}'"):
            if str(_aliases(self._client.get_registered_model(model)).get(alias)) == version:
                self._client.delete_registered_model_alias(model, alias)

    def tag(self, model: str, version: str, tags: Mapping[str, str]) -> None:
        """The tags are set on the version. Idempotent."""
        with self._asking(f"tag version {version} of '{model}'"):
            for name, value in tags.items():
                self._client.set_model_version_tag(model, version, name, value)

    def record(self, version: ModelVersion, metrics: Mapping[str, float], files: Sequence[Path] = ()) -> str:
        """Metrics and files (under `lockgate/reports`) are kept with the version's run; returns a link to it (to the
        last of the files, where there are any)."""
        for file in files:
            if not file.is_file():
                raise BadInput(f"{file}: no such file")
        with self._asking(f"record on '{version.model}' version {version.version}"):
            self._measure(version.run_id, metrics)
            for file in files:
                self._client.log_artifact(version.run_id, str(file), "lockgate/reports")
            experiment = self._client.get_run(version.run_id).info.experiment_id
        if self._uri.startswith("http"):
            shown = f"/artifacts/lockgate/reports/{quote(files[-1].name)}" if files else ""
            return f"{self._uri}/#/experiments/{experiment}/runs/{version.run_id}{shown}"
        return f"runs:/{version.run_id}"

    # -- its parts

    def _all(self, model: str) -> list[Any]:
        """MLflow's own records of the model's versions."""
        _check_name(model)
        with self._asking(f"list the versions of '{model}'"):
            found: list[Any] = []
            token = None
            while True:  # ends: the server hands out each page once
                page = self._client.search_model_versions(f"name='{model}'", max_results=1000, page_token=token)
                found += page
                token = page.token
                if not token:
                    return found

    def _obtain(self, submission: Submission, work: Path) -> tuple[Path, str | None]:
        """The source as one file; and the version to adopt, if the source is one of the same model."""
        source = submission.source
        if match := _VERSION_URI.match(source):
            number = match["version"] or self._client.get_registered_model(match["name"]).aliases.get(match["alias"])
            if number is None:
                raise NotThere(f"{source}: '{match['name']}' has no alias '{match['alias']}'")
            found = self._client.get_model_version(match["name"], number)
            if root := found.tags.get(TAG + "artifacts"):
                return self._download(f"{root}/model/model.onnx", work), None
            uri = self._client.get_model_version_download_uri(match["name"], number)
            onnx = single_file(onnx_within(self._download(uri, work), source), work)
            return onnx, str(number) if match["name"] == submission.model else None
        if match := _RUN_URI.match(source):
            self._client.get_run(match["run"])
            return single_file(onnx_within(self._download(source, work), source), work), None
        if ":/" in source:
            raise BadInput(f"'{source}': a source is an .onnx file, models:/name/version or runs:/id/path")
        path = Path(source)
        if path.suffix.lower() != ".onnx" or not path.is_file():
            raise BadInput(f"{path}: " + ("no such file" if path.suffix.lower() == ".onnx" else "not an .onnx file"))
        return single_file(path, work), None

    def _with_digest(self, model: str, digest: str) -> ModelVersion | None:
        return next((version for version in self.versions(model) if version.digest == digest), None)

    def _store(
        self,
        submission: Submission,
        files: Mapping[str, Path],
        onnx: Path,
        signature: Signature,
        digest: str,
        work: Path,
    ) -> dict[str, str]:
        """Everything of the version but the version itself, in a run; returns the tags that lead there."""
        folder = work / "model"
        save_model(onnx, signature, files.get("expected"), folder)
        run = self._client.create_run(
            self._experiment(submission.model),
            run_name=f"{submission.model} {digest[:8]}",
            tags={TAG + "source": submission.source, TAG + "digest": digest},
        )
        try:
            self._client.log_artifacts(run.info.run_id, str(folder), "model")
            self._keep(run.info.run_id, submission, files)
        except BaseException:
            self._client.set_terminated(run.info.run_id, "FAILED")
            raise
        self._client.set_terminated(run.info.run_id)
        return {
            TAG + "digest": digest,
            TAG + "signature": _written(signature),
            TAG + "artifacts": run.info.artifact_uri,
            TAG + "run": run.info.run_id,
            TAG + "source": submission.source,
            **_tags_of(submission, files),
        }

    def _keep(self, run_id: str, submission: Submission, files: Mapping[str, Path]) -> None:
        self._measure(run_id, submission.metrics)
        with tempfile.TemporaryDirectory(dir=self._cache) as aside:
            for kind, path in files.items():
                named = Path(aside) / f"{kind}{path.suffix.lower()}"
                named.symlink_to(path.resolve())  # MLflow names an artifact by its file
                self._client.log_artifact(run_id, str(named), "lockgate")

    def _measure(self, run_id: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        named = [Metric(re.sub(r"[^\w./ -]", "_", name), value, now_ms, 0) for name, value in metrics.items()]
        for start in range(0, len(named), 1000):  # the server takes no more at once
            self._client.log_batch(run_id, metrics=named[start : start + 1000])

    def _experiment(self, model: str) -> str:
        name = f"lockgate/{model}"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            from mlflow.exceptions import MlflowException

            try:
                return str(self._client.create_experiment(name))
            except MlflowException as exc:
                if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise BadInput(
                f"the experiment '{name}' was deleted; restore it: mlflow experiments restore -x {found.experiment_id}"
            )
        return str(found.experiment_id)

    def _create(self, model: str, tags: Mapping[str, str]) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model)
        except MlflowException as exc:
            if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._client.create_model_version(
            model, source=f"{tags[TAG + 'artifacts']}/model", run_id=tags[TAG + "run"], tags=dict(tags)
        )
        first = self._with_digest(model, tags[TAG + "digest"])
        if first is not None and first.version != str(made.version):
            # Somebody registered the same bytes in the same moment, and was first.
            self._client.delete_model_version(model, made.version)
            return first
        return self.version(model, str(made.version))

    def _tagged(self, model: str, version: str, tags: Mapping[str, str]) -> ModelVersion:
        """The version with the tags; the digest, by which it is known as ours, comes last."""
        for name in sorted(tags, key=lambda name: name == TAG + "digest"):
            self._client.set_model_version_tag(model, version, name, tags[name])
        return self.version(model, version)

    def _cached(self, uri: str, digest: str, suffix: str, what: str) -> Path:
        path = self._cache / "files" / f"{digest}{suffix}"
        if path.is_file() and sha256_of(path) == digest:
            return path
        with self._workplace() as work:
            found = self._download(uri, work)
            seen = sha256_of(found)
            if seen != digest:
                raise Refused(f"{what}: the bytes in the registry have the digest {seen}, registered were {digest}")
            path.parent.mkdir(parents=True, exist_ok=True)
            return found.replace(path)

    def _download(self, uri: str, into: Path) -> Path:
        return Path(
            _vendor().artifacts.download_artifacts(
                artifact_uri=uri, dst_path=str(into / "download"), tracking_uri=self._uri, registry_uri=self._uri
            )
        )

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """A folder on the cache's disk, gone afterwards."""
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as folder:
            yield Path(folder)

    def _asking(self, what: str) -> AbstractContextManager[None]:
        _vendor()
        return errors_mlflow.asking(what, self._uri, self._cache)


# -- values


def _check_name(model: str) -> None:
    if not _NAME.match(model):
        raise BadInput(f"'{model}' cannot be a model's name: it must not be empty or hold / : or quotes")


def _files(submission: Submission) -> dict[str, Path]:
    """The files that were handed in, by kind, each readable and with rows."""
    given = {kind: getattr(submission, kind) for kind in KINDS}
    files = {kind: path for kind, path in given.items() if path is not None}
    for path in files.values():
        rows.read(path, limit=1)
    return files


def _check_expected(files: Mapping[str, Path], signature: Signature) -> None:
    """`expected` has predictions and every input: a parity check that cannot be made is told now, not at delivery."""
    if path := files.get("expected"):
        table = rows.read(path, limit=1, text=rows.text_inputs(signature))
        rows.numbers(table, rows.PREDICTION, path, "column with the training framework's answers")
        rows.feeds(table, signature, path)


def _tags_of(submission: Submission, files: Mapping[str, Path]) -> dict[str, str]:
    """What a version is told by its tags of the files that came with it, and of the signature beside its own."""
    tags = {f"{TAG}file.{kind}": f"{kind}{path.suffix.lower()} {sha256_of(path)}" for kind, path in files.items()}
    beside = Path(f"{submission.source}.sig")
    if submission.source.endswith(".onnx") and beside.is_file():
        tags[SIGNED_TAG] = "".join(beside.read_text("ascii", "replace").split())
    return tags


def _written(signature: Signature) -> str:
    def side(tensors: Sequence[Tensor]) -> list[list[Any]]:
        return [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]

    return json.dumps({"inputs": side(signature.inputs), "outputs": side(signature.outputs)}, separators=(",", ":"))


def _aliases(found: Any) -> dict[str, str]:
    return {alias: str(version) for alias, version in found.aliases.items()}


def _listed(found: Any) -> Listed:
    return Listed(str(found.version), found.creation_timestamp / 1000, dict(found.tags))


def _version(found: Any) -> ModelVersion:
    body = json.loads(found.tags[TAG + "signature"])
    inputs, outputs = (
        tuple(Tensor(name, dtype, tuple(shape)) for name, dtype, shape in body[side]) for side in ("inputs", "outputs")
    )
    return ModelVersion(
        model=found.name,
        version=str(found.version),
        digest=found.tags[TAG + "digest"],
        signature=Signature(inputs, outputs),
        run_id=found.tags[TAG + "run"],
        tags=dict(found.tags),
        signed=found.tags.get(SIGNED_TAG, ""),
    )
