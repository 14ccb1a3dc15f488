"""Who gets which requests: the route of a model, as agreed between the rollout, the router and the gateway."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """The traffic of one model.

    `stable` is the proven version, which also answers whatever the candidate could not. `candidate` gets `weight`
    percent of the live traffic, and a copy of `shadow` percent of the stable version's (its answers are thrown away).
    With `weight` 100 and `shadow` > 0 the roles turn round: the candidate answers, the stable version gets the copies.
    `epoch` orders changes: whoever holds the route refuses an older one. With `lease_s`, the candidate's share ends
    that long after the last renewal, by itself.
    """

    model: str
    stable: str | None
    candidate: str | None = None
    weight: int = 0
    shadow: int = 0
    epoch: int = 0
    lease_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 100:
            raise ValueError(f"weight {self.weight} is not between 0 and 100 percent")
        if not 0 <= self.shadow <= 100:
            raise ValueError(f"shadow {self.shadow} is not between 0 and 100 percent")
        if self.candidate is None and (self.weight or self.shadow):
            raise ValueError("a share of the traffic needs a candidate")
        if self.stable is None and self.candidate is not None and self.weight != 100:
            raise ValueError("without a stable version the candidate must get all of the traffic")
