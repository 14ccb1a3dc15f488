"""Rows port: the columns that the checks need, from CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infra import rows
from tasks.ports import Signature


class ArrowRows:
    """Reads with pyarrow; see `infra/rows.py` for how columns become inputs."""

    def label(self, path: Path, name: str) -> Sequence[float]:
        found: list[float] = rows.label(rows.read(path), name, path).tolist()
        return found

    def prediction(self, path: Path) -> Sequence[float]:
        found: list[float] = rows.numbers(rows.read(path), rows.PREDICTION, path).tolist()
        return found

    def groups(self, path: Path, name: str) -> Sequence[str]:
        found: list[str] = rows.groups(rows.read(path), name, path).tolist()
        return found

    def fits(self, path: Path, signature: Signature, label: str | None) -> None:
        few = rows.read(path, limit=100, text=rows.text_inputs(signature))
        rows.feeds(few, signature, path, label)
