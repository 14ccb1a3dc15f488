"""`python -m tests.simulation.run --rollouts N --seed S`: simulates until N rollouts have been driven to their end.

`--replay SEED` plays one seed again and shows everything that happens in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field

from tests.simulation.promises import breaches
from tests.simulation.scenario import scenario
from tests.simulation.world import Run

REPLAY = "python -m tests.simulation.run --replay {seed}"


@dataclass
class Tally:
    """What was simulated: how many runs and rollouts, how they ended, and which seeds broke which promises."""

    runs: int = 0
    rollouts: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    broken: dict[int, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: the figures, then each broken seed with the command that replays it."""
        ended = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        said = [f"{self.rollouts} rollouts in {self.runs} runs, {self.seconds:.0f} s: {ended}"]
        for seed, what in self.broken.items():
            said += [f"seed {seed}: {each}" for each in what]
            said.append(f"  replay: {REPLAY.format(seed=seed)}")
        return said


def simulate(rollouts: int, base: int, broken_max: int = 10) -> Tally:
    """Seeds from `base` on, until so many rollouts have ended, or so many seeds have broken a promise."""
    tally, began = Tally(), time.perf_counter()
    while tally.rollouts < rollouts and len(tally.broken) < broken_max and tally.runs < 10 * rollouts:
        seed = base + tally.runs
        run = play(seed)
        found = breaches(run)
        if found:
            tally.broken[seed] = found
        tally.runs += 1
        states = run.states()
        tally.rollouts += len(states)
        for state in states:
            tally.outcomes[str(state.phase)] = tally.outcomes.get(str(state.phase), 0) + 1
    tally.seconds = time.perf_counter() - began
    return tally


def play(seed: int, show: bool = False) -> Run:
    """The seed's run, played to its end."""
    return Run(scenario(seed), trace=print if show else None).play()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="the first seed; by default from the clock")
    parser.add_argument("--replay", type=int, metavar="SEED", default=None)
    parser.add_argument("--broken", type=int, default=10, help="stop after so many seeds that broke a promise")
    args = parser.parse_args()
    if args.replay is not None:
        run = play(args.replay, show=True)
        print(run.made)
        found = breaches(run)
        print("\n".join(found) or "every promise was kept")
        return 1 if found else 0
    base = args.seed if args.seed is not None else time.time_ns() % 10**12
    print(f"base seed {base}", flush=True)
    tally = simulate(args.rollouts, base, args.broken)
    print("\n".join(tally.lines()))
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
