"""Whoever calls the champion must be able to call the candidate, and understand its answers."""

from __future__ import annotations

import pytest

from policies.verdict import Verdict
from tasks.ports import ContractBreach, ContractResult, Signature, Tensor
from tasks.validation import check_data, signature_report

CHAMPION = Signature((Tensor("x", "FP32", (-1, 4)),), (Tensor("p", "FP32", (-1, 2)),))


def test_the_same_signature_passes() -> None:
    assert signature_report(CHAMPION, CHAMPION).verdict is Verdict.PASS


def test_an_axis_that_is_free_where_the_champion_s_is_fixed_passes() -> None:
    wider = Signature((Tensor("x", "FP32", (-1, -1)),), CHAMPION.outputs)
    assert signature_report(wider, CHAMPION).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        (Signature((Tensor("x", "FP32", (-1, 2)),), CHAMPION.outputs), "[-1, 2]"),
        (Signature((Tensor("x", "FP32", (1, 4)),), CHAMPION.outputs), "[1, 4]"),
        (Signature((Tensor("x", "FP64", (-1, 4)),), CHAMPION.outputs), "FP64"),
        (Signature((Tensor("x", "FP32", (4,)),), CHAMPION.outputs), "[4]"),
        (Signature((Tensor("y", "FP32", (-1, 4)),), CHAMPION.outputs), "'x' of the champion is missing"),
        (Signature((*CHAMPION.inputs, Tensor("z", "FP32", (-1,))), CHAMPION.outputs), "'z' is new"),
        (Signature(CHAMPION.inputs, (Tensor("p", "FP32", (-1, 3)),)), "output 'p'"),
        (Signature(CHAMPION.inputs, ()), "output 'p' of the champion is missing"),
    ],
)
def test_what_a_caller_would_trip_over_fails_and_is_named(candidate: Signature, word: str) -> None:
    report = signature_report(candidate, CHAMPION)
    assert report.verdict is Verdict.FAIL
    assert word in report.says


class Contract:
    """A data contract that says what it is told to say."""

    def __init__(self, result: ContractResult) -> None:
        self.result = result

    def check(self, suite: object, rows: object) -> ContractResult:
        return self.result


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (ContractResult(100, 3, ()), Verdict.PASS),
        (ContractResult(100, 3, (ContractBreach("not_null", "x", "7 nulls"),)), Verdict.FAIL),
        (ContractResult(0, 3, ()), Verdict.HOLD),
        (ContractResult(100, 0, ()), Verdict.HOLD),
    ],
)
def test_a_contract_that_has_looked_at_nothing_has_not_passed(result: ContractResult, verdict: Verdict) -> None:
    assert check_data.fn(Contract(result), None, None).verdict is verdict  # type: ignore[arg-type]
