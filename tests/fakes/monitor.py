"""Fakes of what `monitor` needs beside a delivery's ports.

`FakeWindows` gives `rows` rows of each period (none: NotThere), `FakeComparer` says that every group is `distance`
away (a `broken` column cannot be compared), `FakeHerald` keeps what it was told, each key once. `down` makes a fake
raise PortError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.evidence import ColumnDrift, Drift, Sums
from tasks.ports import BadInput, Bundle, ModelVersion, NotThere, PortError
from tasks.ports_monitor import Chosen, Notice, Window


class FakeWindows:
    """`tasks.ports_monitor.Windows` without files."""

    def __init__(self) -> None:
        self.rows = 4000
        self.down = False
        self.periods: list[tuple[float, float]] = []
        self.live, self.known = Sums(1000.0, 100.0, 60.0), Sums(1000.0, 100.0, 60.0)

    def write(
        self, version: ModelVersion, bundle: Bundle, chosen: Chosen, since: float, until: float, folder: Path
    ) -> Window:
        if self.down:
            raise PortError("the samples cannot be read (by the test)")
        self.periods.append((since, until))
        if not self.rows:
            raise NotThere(f"v{version.version} has no sampled row of this period")
        live, reference = folder / "live.parquet", folder / "reference.parquet"
        half = self.rows // 2
        return Window(live, self.rows, half, reference, 4000, 2000, "training rows", ("age",), ("origin",), (0.2,) * 9)

    def losses(self, version: ModelVersion, metric: str, since: float, until: float, wait: float) -> tuple[Sums, int]:
        return self.live, 7

    def known_losses(self, window: Window, metric: str) -> Sums:
        return self.known


class FakeComparer:
    """`tasks.ports_monitor.Comparer` by decree."""

    def __init__(self) -> None:
        self.distance = 0.01
        self.down = False
        self.broken = ""  # a column that cannot be compared
        self.asked: list[tuple[tuple[str, ...], str, int]] = []
        self.snapshots: list[str] = []

    def compare(
        self, window: Window, columns: Sequence[str], method: str, permutations: int
    ) -> tuple[Drift, Drift, Drift]:
        if self.down:
            raise PortError("the drift worker ended (by the test)")
        if self.broken in columns:
            raise BadInput(f"'{self.broken}' has no value to compare (by the test)")
        self.asked.append((tuple(columns), method, permutations))
        p = 1 / (permutations + 1) if self.distance > 0.05 else 0.6
        high, error = self.distance * 1.2, self.distance * 0.05
        seen = tuple(ColumnDrift(name, method, self.distance, p, high=high, error=error) for name in columns)
        halves = (Drift(window.reference_half, window.live_half, seen, p) for _ in range(2))
        return (Drift(window.reference_rows, window.live_rows, seen, 1.0), *halves)  # type: ignore[return-value]

    def snapshot(self, model: str, at: float, window: Window, page: Path) -> Path:
        if self.down:
            raise PortError("the drift worker ended (by the test)")
        self.snapshots.append(page.name)
        page.write_text("<html></html>")
        return page


class FakeHerald:
    """`tasks.ports_monitor.Herald`; `told` has (event, model, version), `started` the deployments.

    The server forgets after some minutes what it was told, this fake never: `posts` has each key as often as it came.
    """

    def __init__(self) -> None:
        self.down = False
        self.told: list[tuple[str, str, str]] = []
        self.about: list[tuple[str, str, str | None, Mapping[str, object]]] = []  # event, rollout, flow run, payload
        self.started: list[str] = []
        self.posts: list[str] = []
        self.up_to: int | None = None
        self.deployments = {"train/it"}
        self._keys: set[str] = set()

    def tell(self, notice: Notice) -> None:
        if self.down:
            raise PortError("the orchestrator does not answer (by the test)")
        self.posts.append(f"{notice.key} {notice.event}")
        if f"{notice.key} {notice.event}" not in self._keys:
            self._keys.add(f"{notice.key} {notice.event}")
            self.told.append((notice.event, notice.model, notice.version))
            self.about.append((notice.event, notice.rollout, notice.flow_run, notice.payload))

    def told_up_to(self) -> int | None:
        if self.down:
            raise PortError("the orchestrator does not answer (by the test)")
        return self.up_to

    def note_told(self, number: int) -> None:
        if self.down:
            raise PortError("the orchestrator does not answer (by the test)")
        self.up_to = number

    def start(self, key: str, deployment: str, parameters: Mapping[str, object]) -> str:
        if self.down:
            raise PortError("the orchestrator does not answer (by the test)")
        if deployment not in self.deployments:
            raise NotThere(f"no deployment '{deployment}'")
        if f"{key} start" not in self._keys:
            self._keys.add(f"{key} start")
            self.started.append(deployment)
        return "run"


class FakeForms:
    """`flows.form.Forms` as a list of the keys that are open, and of all that ever were."""

    def __init__(self) -> None:
        self.down = False
        self.open: list[str] = []
        self.opened: list[str] = []

    def keep(self, wanted: Sequence[Any]) -> None:
        if self.down:
            raise PortError("the orchestrator does not answer (by the test)")
        self.opened += [each.name for each in wanted if each.key not in self.open]
        self.open = [each.key for each in wanted]
