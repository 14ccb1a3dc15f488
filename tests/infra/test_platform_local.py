"""The local platform's supervision: whoever dies is started again, later and later, but never too late."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import platform_local
from infra.platform_local import LocalPlatform


class Dead:
    """A process that has ended."""

    returncode = -9


class Time:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(platform_local, "time", made)
    return made


def away(platform: LocalPlatform, clock: Time, lives_s: float) -> float:
    """How long the platform's only part is away when it dies after so many seconds of life."""
    [part] = platform.parts
    started: list[float] = []
    part.process = Dead()  # type: ignore[assignment]
    part.code = lambda: -9  # type: ignore[method-assign]
    part.start = lambda: started.append(clock.now)  # type: ignore[method-assign]
    part.started_at, died = clock.now - lives_s, clock.now
    while not started:
        list(platform.supervise())
        clock.now += 0.05
    return started[0] - died


def test_a_part_that_dies_again_and_again_is_started_later_and_later(clock: Time, tmp_path: Path) -> None:
    platform = LocalPlatform(tmp_path)
    platform.parts = [platform._prefect()]
    waited = [away(platform, clock, lives_s=1.0) for _ in range(10)]
    assert waited == sorted(waited)
    assert waited[0] < 0.5
    assert waited[-1] == pytest.approx(30.0, abs=0.2)
    platform.parts[0].restarts = 2000
    assert away(platform, clock, lives_s=1.0) == pytest.approx(30.0, abs=0.2), "after hours, too"
    assert away(platform, clock, lives_s=100.0) < 0.5, "one that has run steadily is started at once"


def test_who_keeps_the_leases_is_never_away_for_long(clock: Time, tmp_path: Path) -> None:
    """While the agent is away nobody takes a canary's share back."""
    platform = LocalPlatform(tmp_path)
    platform.parts = [platform._agent()]
    assert max(away(platform, clock, lives_s=1.0) for _ in range(20)) < 1.5
