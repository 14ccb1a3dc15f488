"""Nothing is ever lost: rollouts under faults, deaths and lies keep every promise. A failing seed replays exactly."""

from __future__ import annotations

import os

import pytest

from policies.events import Phase
from tests.simulation.run import play, simulate
from tests.simulation.scenario import scenario

ROLLOUTS = int(os.environ.get("LOCKGATE_SIMULATE", "10000"))


@pytest.mark.timeout(900)
def test_whatever_goes_wrong_every_promise_is_kept() -> None:
    """So many rollouts, with seeds that nobody has seen before."""
    tally = simulate(ROLLOUTS, int(os.environ["LOCKGATE_SIMULATE_SEED"]))
    assert not tally.broken, "\n" + "\n".join(tally.lines())
    assert tally.rollouts >= ROLLOUTS
    assert {Phase.PROMOTED, Phase.ROLLED_BACK, Phase.REFUSED} <= set(tally.outcomes), tally.outcomes


def test_a_seed_replays_exactly() -> None:
    """Else a failure that is seen once is never seen again. A seed with faults, deaths and several processes."""
    seed = next(n for n in range(10_000) if (made := scenario(n)).weather.rates and made.deaths and len(made.asked) > 2)
    told = [[(e.at, e.rollout, e.kind, e.body.get("verdict")) for e in play(seed).ledger.entries] for _ in range(2)]
    assert told[0] == told[1]
