"""What every Ledger promises. A subclass gives `connect`, which opens the same (at first empty) ledger once more, as
another process would, with a clock that always says `NOW`; and is collected where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from policies import audit
from policies.audit import FIRST_HASH, Head
from policies.events import (
    Checked,
    Done,
    Event,
    Looked,
    Ordered,
    Phase,
    Requested,
    Stop,
    Taken,
    Terms,
    from_body,
    to_body,
)
from policies.rollout import Rollout, fold, step
from policies.verdict import Verdict
from tasks.ports import BadInput, Entry, Ledger, NotThere, Refused

NOW = 1_700_000_000.25
Connect = Callable[[], Ledger]

TERMS = Terms((Stop(Phase.CANARY, 5, 0, 60.0),), 0.0, 0, 60.0, 30.0, 600.0, "rollback")


def request(model: str = "m", digest: str = "d1") -> Event:
    return Requested(0.0, 0, model, "2", digest, "1", TERMS)


def append(ledger: Ledger, rollout: str, sequence: int, event: Event) -> Entry:
    kind, body = to_body(event)
    return ledger.append(rollout, sequence, 10.0 * sequence, "tester", kind, body)


def state_of(ledger: Ledger, rollout: str) -> Rollout:
    state = fold(from_body(entry.kind, entry.body, entry.at, entry.number) for entry in ledger.read(rollout))
    assert state is not None
    return state


def carry_out(ledger: Ledger, rollout: str, also_outbox: bool = True) -> Rollout:
    """Every effect that the rollout asks for is done, until it asks for none; checks pass."""
    for _ in range(50):
        state = state_of(ledger, rollout)
        wanted = [*state.pending, *(state.outbox if also_outbox else ())]
        if not wanted:
            break
        sequence = len(ledger.read(rollout)) + 1
        checks = wanted[0].do == "check"
        event = Checked(0.0, 0, Verdict.PASS, "fine") if checks else Done(0.0, 0, wanted[0].id)
        append(ledger, rollout, sequence, event)
    return state_of(ledger, rollout)


def whole(lines: Iterable[bytes]) -> list[bytes]:
    return list(lines)


class LedgerContract:
    """Inherit it."""

    @pytest.fixture
    def ledger(self, connect: Connect) -> Ledger:
        return connect()

    # ------------------------------------------------------------ entries

    def test_what_was_appended_is_read_by_everybody_exactly_as_it_was_given(
        self, ledger: Ledger, connect: Connect
    ) -> None:
        body = {
            "text": "Grüße — \x01 😀 \"'\\",
            "nested": {"b": [1, 2.5, -0.0, 1e300, 5e-324, 0.1 + 0.2], "a": None, "": True},
            "large": 2**70,
        }
        made = ledger.append("r1", 1, NOW + 1 / 3, "host/1/ü", "noted", body)
        assert (made.number, made.rollout, made.sequence) == (1, "r1", 1)
        assert (made.at, made.actor, made.kind, made.body) == (NOW + 1 / 3, "host/1/ü", "noted", body)
        assert ledger.read("r1") == [made]
        assert connect().read("r1") == [made]
        assert ledger.read("r2") == []

    def test_evidence_that_is_no_number_is_kept_as_it_is(self, ledger: Ledger, connect: Connect) -> None:
        ledger.append("r1", 1, NOW, "t", "looked", {"evidence": [math.nan, {"high": math.inf, "low": -math.inf}]})
        (entry,) = connect().read("r1")
        nan, bounds = entry.body["evidence"]
        assert math.isnan(nan)
        assert bounds == {"high": math.inf, "low": -math.inf}

    def test_what_append_returns_is_what_is_read(self, ledger: Ledger) -> None:
        """Tuples come back as lists, enums and keys as texts: from both, so that no caller sees two forms."""
        made = ledger.append("r1", 1, 5, "t", "noted", {"shape": (1, 2), "verdict": Verdict.FAIL, "n": {9: 1, 10: 2}})
        assert made.body == {"shape": [1, 2], "verdict": "fail", "n": {"9": 1, "10": 2}}
        assert type(made.at) is float
        assert ledger.read("r1") == [made]

    def test_a_body_that_could_not_be_read_as_written_is_refused_and_nothing_is_written(self, ledger: Ledger) -> None:
        for body in ({"when": object()}, {"set": {1}}, {"keys": {2: "b", "2": "a"}}, {"bytes": b"x"}):
            with pytest.raises(BadInput, match="r1"):
                ledger.append("r1", 1, NOW, "t", "noted", body)
        for text in ("caf\udce9", "nul \0"):  # PostgreSQL's JSON takes neither, and no UTF-8 the first
            with pytest.raises(BadInput, match="cannot be kept"):
                ledger.append("r1", 1, NOW, "t", "requested", {"model": "m", "request": {"reason": text}})
        for at, actor, kind in ((math.nan, "t", "noted"), (NOW, "a\nb", "noted"), (NOW, "t", "\0"), (NOW, "", "noted")):
            with pytest.raises(BadInput):
                ledger.append("r1", 1, at, actor, kind, {})
        assert ledger.head() == Head()

    def test_sequences_count_the_rollouts_entries_and_numbers_the_ledgers(self, ledger: Ledger) -> None:
        for rollout, sequence in (("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)):
            ledger.append(rollout, sequence, NOW, "t", "noted", {})
        assert [(e.number, e.sequence) for e in ledger.read("a")] == [(1, 1), (3, 2), (5, 3)]
        assert [(e.number, e.sequence) for e in ledger.read("b")] == [(2, 1), (4, 2)]
        assert [e.sequence for e in ledger.read("a", after=1)] == [2, 3]
        assert ledger.read("a", after=3) == []
        assert [e.sequence for e in ledger.last("a", 2)] == [2, 3]
        assert [e.sequence for e in ledger.last("b", 5)] == [1, 2]
        assert ledger.last("c", 1) == []

    @pytest.mark.parametrize("sequence", [-1, 0, 1, 2, 4, 5])
    def test_only_the_next_sequence_is_taken(self, ledger: Ledger, connect: Connect, sequence: int) -> None:
        """A second controller that thinks it owns the rollout loses the race, and learns it."""
        first = [ledger.append("r1", n, NOW, "one", "noted", {}) for n in (1, 2)]
        with pytest.raises(Refused, match="next one is 3"):
            connect().append("r1", sequence, NOW, "two", "noted", {"mine": True})
        assert ledger.read("r1") == first
        assert connect().append("r1", 3, NOW, "two", "noted", {}).number == 3

    def test_of_many_who_write_the_same_sequence_exactly_one_does(self, connect: Connect) -> None:
        ledgers = [connect() for _ in range(6)]

        def race(of: int) -> list[int]:
            won = []
            for sequence in range(1, 9):
                try:
                    ledgers[of].append("r1", sequence, NOW, f"writer {of}", "noted", {"by": of})
                except Refused:
                    continue
                won.append(sequence)
            return won

        with ThreadPoolExecutor(len(ledgers)) as pool:
            won = list(pool.map(race, range(len(ledgers))))
        entries = connect().read("r1")
        assert sorted(sequence for each in won for sequence in each) == list(range(1, len(entries) + 1))
        assert all(entry.sequence in won[entry.body["by"]] for entry in entries)
        assert audit.verify(connect().lines(), connect().head()).breach is None

    def test_many_rollouts_written_at_once_lose_nothing_and_leave_one_chain(self, connect: Connect) -> None:
        def write(of: int) -> None:
            ledger = connect()
            for sequence in range(1, 11):
                ledger.append(f"r{of}", sequence, NOW, "t", "noted", {"n": sequence})

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(write, range(6)))
        ledger = connect()
        assert ledger.head().number == 60
        assert audit.verify(ledger.lines(), ledger.head()).breach is None
        for of in range(6):
            assert [entry.body["n"] for entry in ledger.read(f"r{of}")] == list(range(1, 11))

    # ------------------------------------------------------------ the chain

    def test_every_entry_carries_the_hash_of_the_one_before_it_in_the_whole_ledger(self, ledger: Ledger) -> None:
        assert ledger.head() == Head(0, FIRST_HASH)
        made = [ledger.append(rollout, 1, NOW, "t", "noted", {}) for rollout in ("a", "b", "c")]
        assert [entry.previous_hash for entry in made] == [FIRST_HASH, made[0].hash, made[1].hash]
        assert len({entry.hash for entry in made}) == 3
        assert ledger.head() == Head(3, made[-1].hash)

    def test_the_lines_hold_every_entry_and_verify_up_to_the_head(self, ledger: Ledger) -> None:
        assert whole(ledger.lines()) == []
        for sequence in (1, 2, 3):
            append(ledger, "r1", sequence, request() if sequence == 1 else Taken(0.0, 0, f"c{sequence}"))
        ledger.quarantine("d1", "slower", "r1")
        ledger.append("r2", 1, NOW, "ü", "looked", {"p": math.nan, "é": "😀"})
        lines, head = whole(ledger.lines()), ledger.head()
        assert [audit.parse(line)["number"] for line in lines] == [1, 2, 3, 4, 5]
        found = audit.verify(lines, head)
        assert (found.head, found.breach) == (head, None)
        assert whole(ledger.lines(after=3)) == lines[3:]
        at_three = audit.verify(lines[:3]).head
        assert audit.verify(ledger.lines(after=3), head, after=at_three).breach is None

    def test_an_entrys_line_says_what_the_entry_says(self, ledger: Ledger) -> None:
        made = ledger.append("r1", 1, NOW, "t", "noted", {"a": [1, {"b": None}]})
        (line,) = ledger.lines()
        assert audit.parse(line) == asdict(made)

    # ------------------------------------------------------------ rollouts

    def test_rollouts_are_listed_newest_first_and_by_model(self, ledger: Ledger) -> None:
        for name, model in (("r1", "a"), ("r2", "b"), ("r3", "a")):
            append(ledger, name, 1, request(model))
        append(ledger, "r1", 2, Taken(0.0, 0, "c"))
        ledger.quarantine("d", "bad", "r1")  # stands in the ledger, and is no rollout
        assert ledger.rollouts() == ["r3", "r2", "r1"]
        assert ledger.rollouts("a") == ["r3", "r1"]
        assert ledger.rollouts("b") == ["r2"]
        assert ledger.rollouts("c") == []

    def test_a_rollout_is_active_until_it_has_ended_and_unsettled_until_nothing_is_left_to_do(
        self, ledger: Ledger, connect: Connect
    ) -> None:
        append(ledger, "old", 1, request("a"))
        append(ledger, "new", 1, request("b"))
        assert ledger.rollouts(active=True) == ["new", "old"] == ledger.unsettled()
        carry_out(ledger, "old", also_outbox=False)
        append(ledger, "old", len(ledger.read("old")) + 1, Ordered(0.0, 0, "abort"))
        ended = carry_out(ledger, "old", also_outbox=False)
        assert (ended.phase, ended.settled) == (Phase.ROLLED_BACK, False)
        assert ledger.rollouts(active=True) == ["new"] == connect().rollouts(active=True)
        assert ledger.rollouts("a", active=True) == []
        assert ledger.unsettled() == ["new", "old"] == connect().unsettled()
        assert carry_out(ledger, "old").settled
        for _ in range(2):
            assert ledger.unsettled() == ["new"] == connect().unsettled()
        assert ledger.rollouts() == ["new", "old"]

    def test_a_rollout_that_makes_no_sense_stays_in_sight(self, ledger: Ledger) -> None:
        append(ledger, "r1", 1, request())
        append(ledger, "r1", 2, Looked(0.0, 0, Verdict.PASS, "before its time"))
        ledger.append("r2", 1, NOW, "t", "requested", {"model": "m"})
        assert ledger.rollouts(active=True) == ["r2", "r1"] == ledger.unsettled()

    def test_what_is_folded_from_the_ledger_is_the_machines_state(self, ledger: Ledger) -> None:
        state: Rollout | None = None
        for sequence, event in enumerate(
            (request(), Taken(0.0, 0, "c"), Checked(0.0, 0, Verdict.PASS, "fine"), Ordered(0.0, 0, "abort", "because")),
            start=1,
        ):
            entry = append(ledger, "r1", sequence, event)
            state, _ = step(state, replace(event, at=entry.at, number=entry.number))
        assert state_of(ledger, "r1") == state

    # ------------------------------------------------------------ claims

    def test_of_many_who_claim_a_model_on_a_target_one_gets_it_and_all_are_told_which(self, connect: Connect) -> None:
        with ThreadPoolExecutor(8) as pool:
            told = set(pool.map(lambda n: connect().claim("m", "local", f"r{n}"), range(24)))
        (holder,) = told
        ledger = connect()
        assert ledger.claim("m", "local", holder) == holder
        assert ledger.claim("m", "local", "another") == holder

    def test_models_and_targets_do_not_stand_in_each_others_way(self, ledger: Ledger) -> None:
        assert ledger.claim("m", "local", "r1") == "r1"
        assert ledger.claim("m", "cluster", "r2") == "r2"
        assert ledger.claim("n", "local", "r3") == "r3"

    def test_only_the_holder_releases_and_releasing_twice_is_releasing_once(self, ledger: Ledger) -> None:
        ledger.claim("m", "local", "r1")
        ledger.release("m", "local", "r2")
        assert ledger.claim("m", "local", "r2") == "r1"
        for _ in range(2):
            ledger.release("m", "local", "r1")
        assert ledger.claim("m", "local", "r2") == "r2"
        ledger.release("m", "local", "r1")
        assert ledger.claim("m", "local", "r3") == "r2"

    def test_who_stands_in_line_has_its_turn_in_the_order_of_coming(self, ledger: Ledger, connect: Connect) -> None:
        assert ledger.claim("m", "local", "r1", in_line=True) == "r1"
        assert ledger.claim("m", "local", "r1", in_line=True) == "r1", "it holds it, and nobody waits"
        for name in ("r2", "r3", "r4"):
            assert connect().claim("m", "local", name, in_line=True) == "r1"
        assert ledger.claim("m", "cluster", "r5", in_line=True) == "r5", "another queue"
        ledger.release("m", "local", "r1")
        for name in ("r4", "r3", "r6"):
            assert connect().claim("m", "local", name, in_line=True) == "r2", "it is the turn of r2"
        assert ledger.claim("m", "local", "r2", in_line=True) == "r2"
        assert ledger.claim("m", "local", "r2", in_line=True) == "r2", "it holds it, and joins no queue"
        assert ledger.claim("m", "local", "r3", in_line=True) == "r2"
        ledger.release("m", "local", "r2")
        ledger.release("m", "local", "r3", unbegun=True)  # it does not come
        assert ledger.claim("m", "local", "r4", in_line=True) == "r4"
        ledger.release("m", "local", "r4")
        assert ledger.claim("m", "local", "r7") == "r7", "a rollback waits for nobody in line"
        ledger.release("m", "local", "r7")
        assert ledger.claim("m", "local", "r6", in_line=True) == "r6"

    def test_a_claim_that_was_thought_dead_is_not_taken_from_a_rollout_that_has_begun_meanwhile(
        self, ledger: Ledger
    ) -> None:
        ledger.claim("m", "local", "r1")
        ledger.append("r1", 1, 0.0, "somebody", "note", {})
        ledger.release("m", "local", "r1", unbegun=True)
        assert ledger.claim("m", "local", "r2") == "r1"
        ledger.claim("n", "local", "r3")
        ledger.release("n", "local", "r3", unbegun=True)
        assert ledger.claim("n", "local", "r4") == "r4"

    # ------------------------------------------------------------ quarantine

    def test_bytes_are_in_quarantine_until_somebody_lifts_it_on_the_record(
        self, ledger: Ledger, connect: Connect
    ) -> None:
        assert ledger.quarantined("d1") is None
        ledger.quarantine("d1", "p99 is 3x", "r1")
        ledger.quarantine("d2", "errors", "r2")
        assert connect().quarantined("d1") == "p99 is 3x"
        listed = ledger.quarantines()
        assert [(q.digest, q.reason, q.rollout, q.since) for q in listed] == [
            ("d1", "p99 is 3x", "r1", NOW),
            ("d2", "errors", "r2", NOW),
        ]
        ledger.lift("d1", "the load generator was broken", "ann")
        assert connect().quarantined("d1") is None
        assert [q.digest for q in connect().quarantines()] == ["d2"]
        lifted = audit.parse(whole(ledger.lines())[-1])
        assert (lifted["actor"], lifted["at"], lifted["kind"]) == ("ann", NOW, "lifted")
        assert lifted["body"] == {"digest": "d1", "reason": "the load generator was broken"}

    def test_quarantine_twice_is_quarantine_once_and_the_first_reason_stays(self, ledger: Ledger) -> None:
        for reason in ("first", "second"):
            ledger.quarantine("d1", reason, "r1")
        assert ledger.quarantined("d1") == "first"
        assert ledger.head().number == 1

    def test_lifted_bytes_can_be_put_in_quarantine_again(self, ledger: Ledger) -> None:
        ledger.quarantine("d1", "first", "r1")
        ledger.lift("d1", "a mistake", "ann")
        ledger.quarantine("d1", "it was none", "r2")
        assert ledger.quarantined("d1") == "it was none"
        assert audit.verify(ledger.lines(), ledger.head()).breach is None

    def test_a_lift_needs_a_quarantine_and_a_reason(self, ledger: Ledger) -> None:
        with pytest.raises(NotThere, match="d1"):
            ledger.lift("d1", "why not", "ann")
        ledger.quarantine("d1", "bad", "r1")
        for reason in ("", "  "):
            with pytest.raises(BadInput, match="reason"):
                ledger.lift("d1", reason, "ann")
        ledger.lift("d1", "fixed", "ann")
        with pytest.raises(NotThere):
            ledger.lift("d1", "again", "ann")
        assert ledger.head().number == 2

    def test_many_quarantine_the_same_bytes_at_once_and_it_is_written_once(self, connect: Connect) -> None:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda n: connect().quarantine("d1", f"reason {n}", f"r{n}"), range(6)))
        assert connect().head().number == 1
