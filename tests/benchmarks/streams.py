"""Traffic for simulated rollouts: thousands at once, as counts per tick, from a seed.

Both versions live through the same world: bursts, daily cycles, and outages that hit them alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One stage: its seconds, and the candidate's share of the live requests.

    With `copies` both versions see every request (shadow); with `watch` the candidate answers all of them, and the
    stable version gets copies of the share that is not `weight`.
    """

    seconds: float
    weight: float
    copies: bool = False
    watch: bool = False


@dataclass(frozen=True)
class World:
    """What the requests are like. Rates per request, one value or one per rollout."""

    rps: Array
    errors: float = 0.002
    slow: float = 0.02
    errors_candidate: float | None = None
    slow_candidate: float | None = None
    restless: bool = True  # bursts and cycles
    outages: float = 0.0  # expected number per rollout; each takes 30 to 600 s and hits both versions
    cluster: int = 1  # errors come in clusters of so many


@dataclass
class Tick:
    """What both versions counted in one tick: requests, errors, slow requests. `stage` may be one per rollout."""

    stage: Any
    at: float
    n_c: Array
    n_s: Array
    k_c: Array
    k_s: Array
    slow_c: Array
    slow_s: Array
    copies: bool = False


def load(world: World, at: float, generator: np.random.Generator) -> Array:
    """Requests a second now: a daily cycle, and bursts of up to five times as many."""
    if not world.restless:
        return world.rps
    cycle = 1.0 + 0.5 * np.sin(2.0 * np.pi * at / 86_400.0 * 24.0)
    bursts = np.where(generator.random(world.rps.shape) < 0.02, 5.0, 1.0)
    return world.rps * cycle * bursts


def outages(world: World, seconds: float, generator: np.random.Generator) -> tuple[Array, Array]:
    """When each rollout's outage begins and ends; never, for those that have none."""
    rollouts = len(world.rps)
    starts = np.where(generator.random(rollouts) < world.outages, generator.random(rollouts) * seconds, np.inf)
    return starts, starts + generator.uniform(30.0, 600.0, rollouts)


def counts(
    world: World, part: Part, tick_s: float, at: float, down: NDArray[np.bool_], generator: np.random.Generator
) -> tuple[Array, ...]:
    """One tick's (n_c, n_s, k_c, k_s, slow_c, slow_s)."""
    total = generator.poisson(load(world, at, generator) * tick_s)
    split = generator.binomial(total, part.weight)
    n_c = total if part.copies or part.watch else split
    n_s = total if part.copies else total - split
    found = [n_c.astype(float), n_s.astype(float)]
    for own, other in ((world.errors, world.errors_candidate), (world.slow, world.slow_candidate)):
        pair = []
        for requests, rate in ((n_c, own if other is None else other), (n_s, own)):
            now = np.where(down, max(0.5, rate), rate)
            events = generator.binomial(requests, now / world.cluster) * world.cluster
            pair.append(np.minimum(events, requests).astype(float))
        found += pair
    return tuple(found)


def ticks(world: World, parts: tuple[Part, ...], tick_s: float, seed: int) -> Iterator[Tick]:
    """The ticks of a rollout whose stages take their planned time, all rollouts in step."""
    generator = np.random.default_rng(seed)
    length = sum(part.seconds for part in parts)
    start, end = outages(world, length, generator)
    at = 0.0
    for stage, part in enumerate(parts):
        for _ in range(max(round(part.seconds / tick_s), 1)):
            down = (start <= at) & (at < end)
            yield Tick(stage, at, *counts(world, part, tick_s, at, down, generator), copies=part.copies)
            at += tick_s
