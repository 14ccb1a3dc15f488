"""A rollout that is followed in a terminal."""

from __future__ import annotations

from flows.live import Followed
from tasks.ports import Entry
from tests.fakes.ledger import FakeLedger
from tests.stories.world import World


class Counted:
    """The part of a ledger that a follower reads; `given` are the entries that it gave."""

    def __init__(self, ledger: FakeLedger) -> None:
        self.ledger = ledger
        self.given: list[int] = []

    def read(self, rollout: str, after: int = 0) -> list[Entry]:
        found = self.ledger.read(rollout, after)
        self.given += [entry.sequence for entry in found]
        return found


def test_who_polls_reads_each_entry_once() -> None:
    world = World()
    counted, name = Counted(world.ledger), world.request()
    followed = Followed(counted, name)  # type: ignore[arg-type]
    world.clock.alarms.append(followed.read)
    world.controller(name).drive()
    followed.read()
    assert followed.state is not None
    assert followed.state.ended
    assert counted.given == list(range(1, len(world.ledger.read(name)) + 1))
    assert len(counted.given) > 20
