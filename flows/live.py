"""A rollout seen in a terminal: followed in the ledger, drawn live, or as plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.story import label_of, reports_in, share_done, weights
from policies.events import Looked, from_body
from policies.rollout import Rollout, step
from policies.verdict import GateReport, Verdict
from tasks.ports import Entry, Ledger, PortError

_POLL_S = 0.3
_LINE_EVERY_S = 5.0
_COLOURS = {Verdict.PASS: "green", Verdict.HOLD: "yellow", Verdict.ERROR: "magenta", Verdict.FAIL: "red"}


@dataclass
class Followed:
    """One rollout, read from the ledger as it grows."""

    ledger: Ledger
    rollout: str
    state: Rollout | None = None
    reports: tuple[GateReport, ...] = ()
    sequence: int = 0
    began: float = 0.0
    at: float = 0.0
    news: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Takes in what is new; `news` has a line for each move."""
        for entry in self.ledger.read(self.rollout, after=self.sequence):
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        event = from_body(entry.kind, entry.body, entry.at, entry.number)
        before = self.state
        self.state, _ = step(before, event)
        self.sequence, self.at = entry.sequence, entry.at
        self.began = self.began or entry.at
        if "reports" in entry.body:
            self.reports = reports_in(entry.body)
        if before is None or label_of(before) != label_of(self.state):
            self.news.append(_move_line(self.state, entry.at - self.began))
        if isinstance(event, Looked) and before is not None and before.verdict is not event.verdict:
            self.news.append(f"    {event.verdict}: {event.says}")


def _move_line(state: Rollout, seconds: float) -> str:
    why = f": {state.reason}" if state.ended and state.reason else ""
    return f"{seconds:6.1f} s  {state.model} v{state.candidate}: {label_of(state)}{why}"


def gates_table(reports: tuple[GateReport, ...]) -> Table:
    """The gates' words, worst first."""
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    for column in ("gate", "verdict", "what it says"):
        table.add_column(column, overflow="fold")
    order = list(_COLOURS)
    for report in sorted(reports, key=lambda each: -order.index(each.verdict)):
        table.add_row(report.gate, Text(report.verdict, style=_COLOURS[report.verdict]), report.says)
    return table


def picture(followed: Followed) -> RenderableType:
    """The rollout as it stands: where it is, who gets the traffic, what the gates say."""
    state = followed.state
    if state is None:
        return Text("waiting for the rollout to begin", style="dim")
    head = Text.assemble(
        (f"{state.model} v{state.candidate}", "bold"),
        f"  {label_of(state)}  ",
        (f"{followed.at - followed.began:.0f} s", "dim"),
    )
    traffic = Table.grid(padding=(0, 1))
    wanted = weights(state)
    if wanted is None:
        traffic.add_row("traffic", "as it was when it halted; who serves: lockgate status", "")
    else:
        weight, shadow = wanted
        traffic.add_row(
            f"traffic  v{state.stable or '-'} {100 - weight:3d} %",
            Bar(100, 0, weight, width=30, color="green", bgcolor="blue"),
            f"{weight:3d} % v{state.candidate}" + (f"   copies: {shadow} %" if shadow else ""),
        )
    traffic.add_row("progress", Bar(100, 0, share_done(state), width=30, color="cyan", bgcolor="black"), "")
    return Group(head, traffic, gates_table(followed.reports))


class LiveView:
    """Follows rollouts in a thread while the main thread works. A context manager.

    `current` names the rollout to follow (None: none yet); `above` and `below` add what the caller has to show.
    """

    def __init__(
        self,
        console: Console,
        ledger: Ledger,
        current: Callable[[], str | None],
        above: Callable[[], RenderableType] | None = None,
        below: Callable[[], str] | None = None,
    ) -> None:
        self.console, self.ledger, self.current = console, ledger, current
        self.above, self.below = above, below
        self.followed: Followed | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="live view", daemon=True)
        self._line_at = 0.0
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(5.0)
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _work(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._show()
            except PortError as exc:
                self.say(f"(the ledger could not be read: {exc})")
        self._show_news()

    def _show(self) -> None:
        name = self.current()
        if name is not None and (self.followed is None or self.followed.rollout != name):
            self._show_news()
            self.followed = Followed(self.ledger, name)
        self._show_news()
        if self._live:
            parts = [self.above() if self.above else Text("")]
            if self.followed is not None:
                parts.append(picture(self.followed))
            if self.below:
                parts.append(Text(self.below(), style="dim"))
            self._live.update(Group(*parts))
        elif self.followed is not None and time.monotonic() - self._line_at >= _LINE_EVERY_S:
            self._line_at = time.monotonic()
            self._plain_line(self.followed)

    def _show_news(self) -> None:
        if self.followed is None:
            return
        self.followed.read()
        for line in self.followed.news:
            self.say(line)
        self.followed.news.clear()

    def _plain_line(self, followed: Followed) -> None:
        state = followed.state
        traffic = weights(state) if state is not None else None
        if state is None or state.ended or traffic is None:
            return
        words = ", ".join(f"{report.gate} {report.verdict}" for report in followed.reports)
        below = self.below() if self.below else ""
        extra = f"; {below}" if below else ""
        self.say(f"            {label_of(state)}, {traffic[0]} % on v{state.candidate}; {words or 'checking'}{extra}")
