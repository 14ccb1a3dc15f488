"""`python -m tests.simulation.run --rollouts N --seed S`: simulates until N rollouts have been driven to their end.

Seed after seed from S on, spread over the machine's cores; what becomes of a seed depends on nothing but the seed, and
which seeds are played on nothing but S and N. So `--seed S --rollouts 1` plays the seed S again, and `--replay S` shows
everything that happens in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count

from tests.simulation.promises import breaches
from tests.simulation.scenario import scenario
from tests.simulation.world import Run

REPLAY = 'make simulate ARGS="--seed {seed} --rollouts 1"'
_PART = 50  # runs that a process is given at a time
_SAID_EVERY_S = 30.0


@dataclass
class Tally:
    """What was simulated: how many runs and rollouts, how they ended, and which seeds broke which promises."""

    runs: int = 0
    rollouts: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: dict[int, list[str]] = field(default_factory=dict)

    def add(self, more: Tally) -> None:
        """Takes in what was simulated beside it."""
        self.runs += more.runs
        self.rollouts += more.rollouts
        self.outcomes.update(more.outcomes)
        self.broken.update(more.broken)

    def lines(self) -> list[str]:
        """For people: the figures, then each broken seed with the command that replays it."""
        ended = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return [f"{self.rollouts} rollouts in {self.runs} runs, {self.seconds:.0f} s: {ended}", *self.broken_lines()]

    def broken_lines(self) -> list[str]:
        """For people: each broken seed with what it broke and the command that replays it."""
        said = []
        for seed, what in self.broken.items():
            said += [f"seed {seed}: {each}" for each in what]
            said.append(f"  replay: {REPLAY.format(seed=seed)}")
        return said


class Progress:
    """Says how far a long run is: every half minute on stderr, and a broken seed as soon as it is known."""

    def __init__(self, rollouts: int) -> None:
        self._rollouts, self._began, self._said = rollouts, time.perf_counter(), 0.0

    def __call__(self, part: Tally, tally: Tally) -> None:
        """`part` has just been taken into `tally`."""
        for line in part.broken_lines():
            print(line, file=sys.stderr, flush=True)
        elapsed = time.perf_counter() - self._began
        if elapsed - self._said >= _SAID_EVERY_S:
            self._said = elapsed
            broken = f"{len(tally.broken)} seeds broken" if tally.broken else "none broken"
            done = f"{tally.rollouts:,} of {self._rollouts:,} rollouts"
            print(f"{done}, {elapsed:.0f} s, {broken}", file=sys.stderr, flush=True)


def simulate(
    rollouts: int,
    base: int,
    broken_max: int = 10,
    processes: int | None = None,
    progress: Callable[[Tally, Tally], None] | None = None,
) -> Tally:
    """Seeds from `base` on, until so many rollouts have ended, or so many seeds have broken a promise.

    `progress` is told of each part and of all that is known with it.
    """
    tally, began = Tally(), time.perf_counter()
    for part in _parts(base, rollouts, processes or len(os.sched_getaffinity(0))):
        tally.add(part)
        if progress is not None:
            progress(part, tally)
        if tally.rollouts >= rollouts or len(tally.broken) >= broken_max:
            break
    tally.seconds = time.perf_counter() - began
    return tally


def _parts(base: int, rollouts: int, processes: int) -> Iterator[Tally]:
    """What became of the seeds from `base` on, in their order, without end."""
    if processes == 1 or rollouts <= _PART:
        yield from (simulate_seeds(seed, 1) for seed in count(base))
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: list[Future[Tally]] = []
        for seed in count(base, _PART):
            ahead.append(pool.submit(simulate_seeds, seed, _PART))
            if len(ahead) > 2 * processes:
                try:
                    yield ahead.pop(0).result()
                except GeneratorExit:
                    pool.shutdown(cancel_futures=True)
                    raise


def simulate_seeds(base: int, runs: int) -> Tally:
    """So many seeds, one after the other."""
    tally = Tally(runs=runs)
    for seed in range(base, base + runs):
        run = play(seed)
        found = breaches(run)
        if found:
            tally.broken[seed] = found
        phases = [str(state.phase) for state in run.states()]
        tally.rollouts += len(phases)
        tally.outcomes.update(phases)
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
    tally = simulate(args.rollouts, base, args.broken, progress=Progress(args.rollouts))
    print("\n".join(tally.lines()))
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
