"""What a gate may say, and how several gates' words become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """`pass`: shown to be no worse; `hold`: not enough evidence yet; `error`: could not look; `fail`: shown worse."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    HOLD = "hold"
    ERROR = "error"
    FAIL = "fail"


_SEVERITY = (Verdict.PASS, Verdict.HOLD, Verdict.ERROR, Verdict.FAIL)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of the verdicts. None at all is a hold: silence is not success."""
    return max(verdicts, key=_SEVERITY.index, default=Verdict.HOLD)


@dataclass(frozen=True)
class GateReport:
    """What one gate said at one look, in numbers and in a sentence.

    `estimate` with its interval `low`..`high`, `n` observations of the candidate, the `threshold` it is held
    against, all in `unit`; `None` where there is nothing to say. `needs` tells what would change the verdict.
    """

    gate: str
    verdict: Verdict
    says: str
    statistic: float | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    threshold: float | None = None
    unit: str = ""
    needs: str = ""
