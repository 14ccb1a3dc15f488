"""What `monitor` needs of the world beside the ports of a delivery; the errors are those of `tasks.ports`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from policies.evidence import Drift, Sums
from tasks.ports import Bundle, ModelVersion


@dataclass(frozen=True)
class Window:
    """A period's sampled rows beside the reference rows, as Parquet files with the same columns: the model's inputs
    under the reference file's names, and `prediction`.

    The first `live_half` (`reference_half`) rows of a file are one random half of it; rows of one request are never
    parted. `numbers` and `texts` are the inputs by kind. `known`, if there is a labelled validation file: its
    predictions and its truth, row by row.
    """

    live: Path
    live_rows: int
    live_half: int
    reference: Path
    reference_rows: int
    reference_half: int
    reference_name: str
    numbers: tuple[str, ...]
    texts: tuple[str, ...]
    predictions: tuple[float, ...]
    known: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Chosen:
    """Which number of the answer is the prediction, and which column of the validation rows the truth."""

    output: str | None = None
    column: int = -1
    label: str = "label"


class Windows(Protocol):
    """Reads what a version answered, and what it was trained on."""

    def write(
        self, version: ModelVersion, bundle: Bundle, chosen: Chosen, since: float, until: float, folder: Path
    ) -> Window:
        """The rows answered in [since, until) and the reference rows, in files in `folder`.

        Raises NotThere without sampled rows or without reference rows; BadInput for a reference that does not fit.
        """

    def losses(self, version: ModelVersion, metric: str, since: float, until: float, wait: float) -> tuple[Sums, int]:
        """Losses (0 to 1) of the requests whose labels came in [since, until), at most `wait` seconds after the answer;
        and how many requests answered in the last `wait` seconds have none. Raises PortError;
        NotThere where labels came, but all of them for answers that are too many to be read."""

    def known_losses(self, window: Window, metric: str) -> Sums:
        """Losses of the validation rows; none where there are no labels."""


class Comparer(Protocol):
    """Tells how far a window is from its reference."""

    def compare(
        self, window: Window, columns: Sequence[str], method: str, permutations: int
    ) -> tuple[Drift, Drift, Drift]:
        """The whole compared, for the distances and their limits, and each half with a half, for the p-values; in each
        the reference is the `stable` side. Raises PortError."""

    def snapshot(self, model: str, at: float, window: Window, page: Path) -> Path:
        """The detector's own report as an HTML page, kept in its workspace, too. Raises PortError."""


@dataclass(frozen=True)
class Notice:
    """What happened, for automations: about the rollout if one is named, else about the model.

    The same `key` of the same `event` is the same notice. `flow_run` is the id of the run that it belongs to, by
    default that of the caller. `at` is Unix time.
    """

    key: str
    event: str
    model: str
    version: str
    at: float
    payload: Mapping[str, object]
    rollout: str = ""
    flow_run: str | None = None


class Herald(Protocol):
    """Tells the orchestrator's automations."""

    def tell(self, notice: Notice) -> None:
        """It is on its way; told twice, it is there once. Raises PortError."""

    def told_up_to(self) -> int | None:
        """The ledger's entry up to which its events were told; None if that was never noted. Raises PortError."""

    def note_told(self, number: int) -> None:
        """The ledger's events up to this entry were told. Raises PortError."""

    def start(self, key: str, deployment: str, parameters: Mapping[str, object]) -> str:
        """A run of the deployment, by its name; with the same key the same run. Raises NotThere for an unknown one."""


@dataclass(frozen=True)
class MonitorPorts:
    """One adapter per port."""

    windows: Windows
    comparer: Comparer
    herald: Herald
