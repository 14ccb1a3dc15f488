"""Nothing is ever lost: rollouts under faults, deaths and lies keep every promise. A failing seed replays exactly."""

from __future__ import annotations

import os

import pytest

from policies.events import Phase
from tests.simulation.run import play, simulate
from tests.simulation.scenario import scenario

KNOWN = 9_500  # rollouts of seeds that are the same each time: what went well once goes well
FRESH = int(os.environ.get("LOCKGATE_SIMULATE", "500"))  # of seeds that nobody has seen before


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fresh", [False, True], ids=["known seeds", "fresh seeds"])
def test_whatever_goes_wrong_every_promise_is_kept(fresh: bool) -> None:
    """A failing fresh seed is news: the suite prints it, and it replays."""
    base, rollouts = (int(os.environ["LOCKGATE_SIMULATE_SEED"]), FRESH) if fresh else (0, KNOWN)
    tally = simulate(rollouts, base)
    assert not tally.broken, "\n" + "\n".join(tally.lines())
    assert tally.rollouts >= rollouts
    assert {Phase.PROMOTED, Phase.ROLLED_BACK, Phase.REFUSED} <= set(tally.outcomes), tally.outcomes


def test_a_seed_replays_exactly() -> None:
    """Else a failure that is seen once is never seen again. A seed with faults, deaths and several processes."""
    seed = next(n for n in range(10_000) if (made := scenario(n)).weather.rates and made.deaths and len(made.asked) > 2)
    told = [[(e.at, e.rollout, e.kind, e.body.get("verdict")) for e in play(seed).ledger.entries] for _ in range(2)]
    assert told[0] == told[1]
