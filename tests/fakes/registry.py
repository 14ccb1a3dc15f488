"""A fake Registry: versions, aliases and files in memory and a folder; it keeps the contract of `tests/ports`.

`down = True` makes every call raise PortError. `recorded` has, per model and version, the metrics and files recorded.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tasks.ports import (
    BadInput,
    Bundle,
    Inspector,
    Listed,
    ModelVersion,
    NotThere,
    PortError,
    Refused,
    Registered,
    Submission,
)
from tests.fakes.inspector import FakeInspector

KINDS = ("validation", "reference", "expected")


class FakeRegistry:
    """`tasks.ports.Registry` in memory; the bytes lie in `folder`."""

    def __init__(self, folder: Path, inspector: Inspector | None = None) -> None:
        self.folder = folder
        self.down = False
        self.recorded: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        self.files: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
        self._inspector = inspector or FakeInspector()
        self._versions: dict[str, list[ModelVersion]] = {}
        self._aliases: dict[tuple[str, str], str] = {}

    def register(self, submission: Submission) -> ModelVersion:
        self._up()
        if not re.fullmatch(r"[^/:'\"]+", submission.model):
            raise BadInput(f"'{submission.model}' cannot be a model's name")
        given = {kind: getattr(submission, kind) for kind in KINDS if getattr(submission, kind) is not None}
        for path in given.values():
            if not path.is_file():
                raise BadInput(f"{path}: no such file")
        source = self._source(submission.source)
        signature = self._inspector.signature(source)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        known = next((v for v in self.versions(submission.model) if v.digest == digest), None)
        made = known or ModelVersion(
            model=submission.model,
            version=str(len(self._versions.get(submission.model, [])) + 1),
            digest=digest,
            signature=signature,
            run_id=f"run-{submission.model}-{digest[:8]}",
        )
        beside = Path(f"{source}.sig")
        if beside.is_file():
            made = replace(made, signed=beside.read_text().strip())
        kept_already = [each for each in self._versions.get(made.model, []) if each.version != made.version]
        self._versions[made.model] = sorted([*kept_already, made], key=lambda each: int(each.version))
        kept = self._kept(made)
        kept.mkdir(parents=True, exist_ok=True)
        if source != kept / "model.onnx":
            shutil.copy(source, kept / "model.onnx")
        for kind, path in given.items():
            shutil.copy(path, kept / f"{kind}{path.suffix}")
        self.recorded[made.model, made.version].update(submission.metrics)
        return made

    def version(self, model: str, version: str) -> ModelVersion:
        self._up()
        found = next((v for v in self._versions.get(model, ()) if v.version == version), None)
        if found is None:
            raise NotThere(f"no version {version} of '{model}'")
        return found

    def by_alias(self, model: str, alias: str) -> ModelVersion | None:
        self._up()
        if model not in self._versions:
            raise NotThere(f"no model '{model}'")
        number = self._aliases.get((model, alias))
        return None if number is None else self.version(model, number)

    def versions(self, model: str) -> Sequence[ModelVersion]:
        self._up()
        return list(self._versions.get(model, ()))

    def models(self) -> Sequence[Registered]:
        self._up()
        return [
            Registered(
                model,
                {},
                {alias: number for (of, alias), number in self._aliases.items() if of == model},
                self.listed(model)[-1:],
            )
            for model in self._versions
        ]

    def listed(self, model: str) -> Sequence[Listed]:
        return [Listed(each.version, float(each.version), each.tags) for each in self.versions(model)]

    def fetch(self, version: ModelVersion) -> Bundle:
        kept = self._kept(self.version(version.model, version.version))
        onnx = kept / "model.onnx"
        if hashlib.sha256(onnx.read_bytes()).hexdigest() != version.digest:
            raise Refused(f"{onnx}: not the bytes that were registered")
        return Bundle(onnx=onnx, **{kind: next(kept.glob(f"{kind}.*"), None) for kind in KINDS})

    def set_alias(self, model: str, alias: str, version: str | None) -> None:
        self._up()
        if version is None:
            self._aliases.pop((model, alias), None)
        else:
            self._aliases[model, alias] = self.version(model, version).version

    def drop_alias(self, model: str, alias: str, version: str) -> None:
        self._up()
        if self._aliases.get((model, alias)) == version:
            del self._aliases[model, alias]

    def tag(self, model: str, version: str, tags: Mapping[str, str]) -> None:
        found = self.version(model, version)
        position = self._versions[model].index(found)
        self._versions[model][position] = replace(found, tags={**found.tags, **tags})

    def record(self, version: ModelVersion, metrics: Mapping[str, float], files: Sequence[Path] = ()) -> str:
        self.version(version.model, version.version)
        for file in files:
            if not file.is_file():
                raise BadInput(f"{file}: no such file")
        self.recorded[version.model, version.version].update(metrics)
        self.files[version.model, version.version].extend(files)
        return f"fake://{version.run_id}"

    def damage(self, version: ModelVersion) -> None:
        """The stored bytes are not any more what was registered."""
        (self._kept(version) / "model.onnx").write_bytes(b"something else")

    def _up(self) -> None:
        if self.down:
            raise PortError("the registry does not answer")

    def _kept(self, version: ModelVersion) -> Path:
        return self.folder / version.model / version.version

    def _source(self, source: str) -> Path:
        if match := re.fullmatch(r"models:/([^/]+)/(\d+)", source):
            return self._kept(self.version(match[1], match[2])) / "model.onnx"
        if source.startswith("runs:/"):
            raise NotThere(f"{source}: no such run")
        if not source.endswith(".onnx"):
            raise BadInput(f"{source}: not an .onnx file")
        return Path(source)
