"""Whatever is done to a ledger after it was written is found: tried on every byte, every line and every cut."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest

from policies import audit
from policies.audit import FIRST_HASH, Breach, Head, NotCanonical

KEY = b"a key of some more than 16 bytes"


def made(count: int = 4, text: str = "é") -> list[bytes]:
    """A small, sound ledger of two rollouts."""
    lines: list[bytes] = []
    head = Head()
    for number in range(1, count + 1):
        body = audit.canonical({"n": number / 7, "says": text, "evidence": [math.nan, None, True], "empty": {}})
        entry = (number, f"r{number % 2}", (number + 1) // 2, 1000.5 + number, "host/1", "looked", body, head.hash)
        head = Head(number, audit.seal(audit.line(*entry)))
        lines.append(audit.line(*entry, head.hash).encode() + b"\n")
    return lines


LINES = made()
HEAD = audit.verify(LINES).head
EXPORT = list(audit.export(LINES, KEY))
UNSIGNED = list(audit.export(LINES))


def split(raw: bytes) -> list[bytes]:
    """As a file is read line by line."""
    return raw.splitlines(keepends=True)


def line_at(lines: list[bytes], offset: int) -> int:
    """The number of the line (from 1) in which the byte at the offset stands."""
    for number, line in enumerate(lines, 1):
        offset -= len(line)
        if offset < 0:
            return number
    raise AssertionError("beyond the end")


def test_a_ledger_that_nobody_touched_verifies_to_its_head() -> None:
    found = audit.verify(LINES, HEAD)
    assert (found.head, found.breach) == (Head(4, json.loads(LINES[-1])["hash"]), None)
    assert audit.verify([]) == audit.Verified(Head())
    assert audit.verify([], Head()).breach is None
    exported = audit.verify_export(EXPORT, KEY)
    assert (exported.head, exported.breach, exported.signed) == (HEAD, None, True)
    unsigned = audit.verify_export(UNSIGNED)
    assert (unsigned.head, unsigned.breach, unsigned.signed) == (HEAD, None, False)
    assert audit.verify_export(EXPORT).breach is None, "without the key a signed export is checked as far as it can be"


# ---------------------------------------------------------------- every edit


def test_every_single_byte_edit_of_an_export_is_detected_and_its_line_named() -> None:
    """Every byte of every line, head line and newlines included, changed in each of its eight bits and to a few
    bytes that mean something in JSON."""
    whole = b"".join(EXPORT)
    tried = 0
    for offset, byte in enumerate(whole):
        others = {byte ^ (1 << bit) for bit in range(8)} | set(b'0"\\{} \n\r,')
        for other in others - {byte}:
            tried += 1
            edited = whole[:offset] + bytes([other]) + whole[offset + 1 :]
            found = audit.verify_export(split(edited), KEY)
            assert found.breach is not None, (offset, bytes([byte]), bytes([other]))
            assert not found.signed
            at = line_at(EXPORT, offset)
            assert found.breach.number == at or at > len(LINES)  # an edited head names what it leaves out
    assert tried > 8 * len(whole)


def test_every_inserted_and_every_removed_byte_is_detected() -> None:
    whole = b"".join(EXPORT)
    for offset in range(len(whole)):
        removed = whole[:offset] + whole[offset + 1 :]
        assert audit.verify_export(split(removed), KEY).breach is not None, offset
    for offset in range(len(whole) + 1):
        for byte in (b" ", b"0", b"\n", b'"', b"\x00", b"\xc3"):
            inserted = whole[:offset] + byte + whole[offset:]
            assert audit.verify_export(split(inserted), KEY).breach is not None, (offset, byte)


def test_every_truncation_of_an_export_is_detected() -> None:
    whole = b"".join(EXPORT)
    for length in range(len(whole)):
        assert audit.verify_export(split(whole[:length]), KEY).breach is not None, length
        assert audit.verify_export(split(whole[:length])).breach is not None, f"{length}, without a key"


def test_every_set_of_deleted_lines_is_detected_and_the_first_one_named() -> None:
    for kept in range(len(EXPORT)):
        for places in combinations(range(len(EXPORT)), kept):
            left = [EXPORT[place] for place in places]
            found = audit.verify_export(left, KEY)
            first = next(place for place in range(len(EXPORT)) if place not in places)
            assert found.breach is not None
            assert found.breach.number == first + 1, places


def test_every_swap_every_repetition_and_every_reversal_is_detected() -> None:
    for one, other in combinations(range(len(EXPORT)), 2):
        swapped = list(EXPORT)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        found = audit.verify_export(swapped, KEY)
        assert found.breach is not None
        assert found.breach.number == one + 1
    for place in range(len(EXPORT)):
        found = audit.verify_export([*EXPORT[: place + 1], *EXPORT[place:]], KEY)
        assert found.breach is not None
    assert audit.verify_export(EXPORT[::-1], KEY).breach is not None


def test_lines_of_another_sound_ledger_do_not_fit() -> None:
    other = made(text="other")
    for place in range(len(LINES)):
        mixed = [*LINES[:place], other[place], *LINES[place + 1 :]]
        found = audit.verify(mixed, HEAD)
        assert found.breach is not None
        assert found.breach.number in (place + 1, place + 2)


def test_an_edit_with_the_hashes_made_anew_is_told_by_the_head_alone() -> None:
    """A chain that was rewritten to its end is sound in itself; so a head has to be kept elsewhere, or signed."""
    forged = made(text="forged")
    assert audit.verify(forged).breach is None
    found = audit.verify(forged, HEAD)
    assert found.breach is not None
    assert found.breach.number == 4
    assert "rewritten" in found.breach.why
    unsigned = list(audit.export(forged))
    assert audit.verify_export(unsigned).breach is None
    for signed_by in (None, b"another key, as long as the first one"):
        found = audit.verify_export(audit.export(forged, signed_by), KEY)
        assert found.breach is not None
        assert "not signed" in found.breach.why


@pytest.mark.parametrize("character", ["\u00e9", "\ud800", "\U0001f600"])
def test_a_signature_of_any_characters_is_not_made_with_the_key(character: str) -> None:
    head = json.loads(EXPORT[-1])
    head["head"]["signature"] = character + head["head"]["signature"][1:]
    found = audit.verify_export([*LINES, audit.canonical(head).encode() + b"\n"], KEY)
    assert found.breach == Breach(5, "the head line is not signed with this key")


@pytest.mark.parametrize("more", [{"zz": []}, {"zz": 1, "zzz": {"head": {}}}])
@pytest.mark.parametrize("inner", [{}, {"x": 1}, {"entries": 9}])
def test_what_is_added_to_the_head_line_is_not_covered_by_its_signature(
    more: dict[str, Any], inner: dict[str, Any]
) -> None:
    head = json.loads(EXPORT[-1])["head"]
    for line in ({"head": {**head, **inner}, **more}, {"head": {**head, "x": 1}}):
        for key in (KEY, None):
            found = audit.verify_export([*LINES, audit.canonical(line).encode() + b"\n"], key)
            assert found.breach == Breach(5, "the head line is not written as an export writes it")
            assert not found.signed


def test_a_cut_with_a_new_head_is_told_by_the_signature() -> None:
    for length in range(len(LINES)):
        cut = list(audit.export(LINES[:length]))
        assert audit.verify_export(cut).breach is None
        assert audit.verify_export(cut, KEY).breach is not None
        reused = [*LINES[:length], EXPORT[-1]]
        found = audit.verify_export(reused, KEY)
        assert found.breach == Breach(length + 1, f"missing; the ledger had 4 entries, {length} are left")


def test_a_known_head_tells_what_is_missing_and_what_is_too_much() -> None:
    for length in range(len(LINES)):
        found = audit.verify(LINES[:length], HEAD)
        assert found.breach is not None
        assert (found.breach.number, found.head.number) == (length + 1, length)
    more = made(5)
    found = audit.verify(more, HEAD)
    assert found.breach is not None
    assert found.breach.number == 5
    assert audit.verify(more[4:], after=HEAD).breach is None
    assert audit.verify(more[3:], after=HEAD).breach is not None


# ---------------------------------------------------------------- the written form


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, 2.0, -0.0, 1e16, 1e-7, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 2**80]},
        {"b": None, "a": [True, False, {"z": [], "": {}}]},
        {"text": 'é\u2028\x00\x1f"\\/\ud800😀', "é": 1},
        {"nan": [math.inf, -math.inf, {"deep": (math.inf,)}]},
    ],
)
def test_a_value_is_written_in_one_way_and_read_again_as_it_was(value: dict[str, Any]) -> None:
    text, again = audit.written(value)
    assert text.isascii()
    assert "\n" not in text
    assert audit.canonical(again) == text
    assert again == json.loads(json.dumps(value))
    assert audit.canonical(dict(reversed(value.items()))) == text, "the order of keys is not part of the value"


def test_not_a_number_is_kept_and_the_text_is_strict_json() -> None:
    text, again = audit.written({"p": math.nan})
    assert math.isnan(again["p"])
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"p": {"$float": "nan"}}


@pytest.mark.parametrize("value", [{"a": object()}, {"a": {1, 2}}, {"a": b""}, {2: "x", "2": "y"}, {2: 0, "a": 1}])
def test_what_json_cannot_hold_is_refused_not_bent(value: dict[Any, Any]) -> None:
    with pytest.raises(NotCanonical, match="cannot be written to the ledger"):
        audit.written(value)


UNFIT = [{"reason": "caf\udce9"}, {"a": [{"b": "nul \0"}]}, {"k\ud800": 1}]


@pytest.mark.parametrize("value", UNFIT)
def test_text_that_no_database_holds_is_refused_and_clean_makes_it_fit(value: dict[str, Any]) -> None:
    with pytest.raises(NotCanonical, match="holds a character that cannot be kept") as refused:
        audit.written_entry("r1", 1.0, "t", "noted", value)
    assert str(refused.value).isascii(), "it can be printed anywhere"
    _, again = audit.written_entry("r1", 1.0, "t", "noted", audit.clean(value))
    assert "\ufffd" in str(again)


def test_text_that_fits_is_left_as_it_is() -> None:
    value = {"reason": "caf\u00e9 \U0001f600 \\u0000", "n": [1, 2.5, None, True]}
    assert audit.clean(value) == value == audit.written_entry("r1", 1.0, "t", "noted", value)[1]
    assert audit.clean_name("ann\n\udce9\u00e9") == "ann\ufffd\ufffd\u00e9"


def test_keys_that_are_numbers_become_texts_in_the_order_of_texts() -> None:
    assert audit.written({10: "b", 9: "a"}) == ('{"10":"b","9":"a"}', {"10": "b", "9": "a"})


def test_a_value_too_deep_to_be_read_again_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(NotCanonical):
        audit.written(deep)
    assert audit.verify([b'{"a":' * 100_000 + b"\n"]).breach is not None


def test_each_entry_names_the_hash_of_the_one_before_it_and_the_first_names_zeros() -> None:
    entries = [json.loads(line) for line in LINES]
    assert entries[0]["previous_hash"] == FIRST_HASH == "0" * 64
    assert all(later["previous_hash"] == earlier["hash"] for earlier, later in pairwise(entries))


def test_the_hash_is_plain_sha256_of_the_line_without_it() -> None:
    """So an auditor needs no lockgate to check it: jq and sha256sum do."""
    import hashlib

    for line in LINES:
        entry = json.loads(line)
        own = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == own


@pytest.mark.parametrize("at", ["1.5", b"1.5", "\uff11.5", True, None])
def test_a_time_that_is_no_number_has_no_line(at: Any) -> None:
    with pytest.raises(NotCanonical, match="no time"):
        audit.line(1, "r1", 1, at, "t", "noted", "{}", FIRST_HASH)
    assert '"at":2.0,' in audit.line(1, "r1", 1, 2, "t", "noted", "{}", FIRST_HASH)


# ---------------------------------------------------------------- exports


def test_a_broken_ledger_is_not_exported_as_a_sound_one() -> None:
    with pytest.raises(ValueError, match="entry 3"):
        list(audit.export([*LINES[:2], *LINES[3:]], KEY))


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16"):
        audit.sign(HEAD, b"short")


def test_lines_are_taken_one_at_a_time() -> None:
    """A ledger of any size is verified in the memory of one entry: nothing is read ahead."""
    taken: list[int] = []

    def lines() -> Iterator[bytes]:
        for number, line in enumerate(LINES, 1):
            taken.append(number)
            yield line

    exported = audit.export(lines())
    next(exported)
    assert taken == [1]
    found = audit.verify(iter([LINES[0], b"broken\n", *([b"never read\n"] * 3)]))
    assert found.breach is not None
    assert found.breach.number == 2
