"""The audit chain: an entry's one and only written form, the hash that ties it to the entry before it, and the check.

A ledger is a sequence of lines. Each line is the canonical JSON of one entry (keys in order, no spaces, ASCII), with
the SHA-256 of the same line without its `hash`; `previous_hash` is the `hash` of the line before. So an edit, a
deletion, a swap or an insertion breaks the chain at the first line that it touches, and `verify` names it.

A chain cannot know that its end is missing: that needs its `Head` (how many entries, the last one's hash), kept where
whoever cuts the ledger cannot reach (an earlier one will do), or signed. An export therefore ends with a line that
holds its head; signed with a key (HMAC-SHA-256, RFC 2104), it cannot be cut or written anew without the key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_HASH = "0" * 64  # what the first entry names as the hash before it
FIELDS = ("actor", "at", "body", "hash", "kind", "number", "previous_hash", "rollout", "sequence")
_UNFIT = re.compile("[\0\ud800-\udfff]")  # NUL, and half a character: what no database and no UTF-8 can hold
_FLOAT = "$float"  # JSON has no NaN and no infinity, evidence has: {"$float": "nan"}


@dataclass(frozen=True)
class Head:
    """The end of a ledger: the number of its last entry (they count from 1 without a gap) and that entry's hash."""

    number: int = 0
    hash: str = FIRST_HASH

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """What `str` wrote. Raises ValueError for anything else."""
        number, _, own_hash = text.partition(":")
        if not number.isdecimal() or len(own_hash) != len(FIRST_HASH):
            raise ValueError(f"'{text}' is not a head: it is written NUMBER:HASH, as `lockgate audit verify` shows it")
        return cls(int(number), own_hash)


@dataclass(frozen=True)
class Breach:
    """The first place where a ledger does not fit: `number` is the entry that should stand there."""

    number: int
    why: str

    def __str__(self) -> str:
        return f"entry {self.number}: {self.why}"


@dataclass(frozen=True)
class Verified:
    """How far a ledger holds: up to `head`; and what is wrong after it, if anything is."""

    head: Head
    breach: Breach | None = None
    signed: bool = False  # the end was held against a signature made with the key


class NotCanonical(ValueError):
    """The value has no written form that would give the same value again."""


# ---------------------------------------------------------------- the written form


_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def canonical(value: Any) -> str:
    """The value as JSON, the same text for the same value always. Raises NotCanonical for what JSON cannot hold."""
    try:
        return _text(value)
    except ValueError:
        pass  # a NaN somewhere, most likely: written the long way below
    except (TypeError, RecursionError) as exc:
        raise NotCanonical(f"cannot be written to the ledger: {exc}; use numbers, texts, lists and objects") from exc
    try:
        return _text(_finite(value))
    except (ValueError, TypeError, RecursionError) as exc:
        raise NotCanonical(f"cannot be written to the ledger: {exc}") from exc


def written(body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An entry's body as text, and as it will be read again: tuples as lists, keys as texts. Raises NotCanonical."""
    text = canonical(body)
    again = parse(text)
    sorted_text = canonical(again)  # keys that were numbers are in another order as texts
    if not isinstance(again, dict) or len(sorted_text) != len(text):
        raise NotCanonical("cannot be written to the ledger: two keys are the same text")
    return sorted_text, again


def written_entry(
    rollout: str, at: float, actor: str, kind: str, body: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """As `written`, with the rest of the entry checked: a real time, names that can be shown, text that all can read.

    Raises NotCanonical. What a machine writes goes through `clean` first: no way back fails for a character.
    """
    if not math.isfinite(at):
        raise NotCanonical(f"{at} is no time for an entry")
    for what, text in (("rollout", rollout), ("actor", actor), ("kind", kind)):
        if not text or not text.isprintable():
            raise NotCanonical(f"{text!r} cannot be the {what} of an entry: it is empty, or cannot be shown")
    text, again = written(body)
    if "\\u" in text:  # else it is ASCII that can be shown
        refuse_unfit(again)
    return text, again


def refuse_unfit(value: Any) -> None:
    """Raises NotCanonical where a text in the value holds NUL or a lone surrogate (a byte that was no UTF-8)."""
    for text in _texts(value):
        found = _UNFIT.search(text)
        if found is not None:
            shown = ascii(text[max(0, found.start() - 30) : found.end() + 30])
            raise NotCanonical(f"{shown} holds a character that cannot be kept ({found[0]!a}): write it in UTF-8")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def clean(value: Any) -> Any:
    """The value with what `refuse_unfit` refuses replaced by U+FFFD: for what comes from elsewhere, an error's text
    or a tag, into entries that a machine writes."""
    if isinstance(value, str):
        return _UNFIT.sub("\ufffd", value) if _UNFIT.search(value) else value
    if isinstance(value, Mapping):
        return {clean(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value


def clean_name(text: str) -> str:
    """The text as the actor of an entry: what cannot be shown is replaced by U+FFFD."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def parse(text: str | bytes) -> Any:
    """The value that `canonical` wrote. Raises ValueError for anything but JSON."""
    return json.loads(text, object_hook=_from_object, parse_constant=_not_json)


def _from_object(made: dict[str, Any]) -> Any:
    if made.keys() == {_FLOAT} and made[_FLOAT] in ("nan", "inf", "-inf"):
        return float(made[_FLOAT])
    return made


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def line(
    number: int,
    rollout: str,
    sequence: int,
    at: float,
    actor: str,
    kind: str,
    body: str,
    previous_hash: str,
    own_hash: str | None = None,
) -> str:
    """The entry's line; without `own_hash`, the text that the hash is taken of. `body` is canonical JSON already.

    Written by hand rather than by `canonical`, so that a stored body goes in exactly as it is stored. Raises
    NotCanonical for a time that is no number: what only reads as the same number is not what was written.
    """
    if isinstance(at, bool) or not isinstance(at, float | int):
        raise NotCanonical(f"{at!r} is no time for an entry")
    middle = f'"hash":"{own_hash}",' if own_hash is not None else ""
    return (
        f'{{"actor":{canonical(actor)},"at":{canonical(float(at))},"body":{body},{middle}"kind":{canonical(kind)},'
        f'"number":{number},"previous_hash":{canonical(previous_hash)},"rollout":{canonical(rollout)},'
        f'"sequence":{sequence}}}'
    )


def seal(text: str) -> str:
    """The hash of an entry's line (the line without the hash itself): SHA-256, in hex."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# ---------------------------------------------------------------- the check


def verify(
    lines: Iterable[bytes], head: Head | None = None, after: Head | None = None, known: Sequence[Head] = ()
) -> Verified:
    """Does every line follow from the one before it, come by the heads that are `known`, and end where `head` says?

    `lines` are whole lines, newline included, from the entry after `after` (from the first one by default). `known` are
    earlier heads of the same ledger, which may have grown since. Without either nothing can be said about entries
    missing at the end.
    """
    reached, breach = _walk(iter(lines), after or Head(), known)
    if breach is None:
        breach = next((_held_against(reached, each) for each in known if reached.number < each.number), None)
    if breach is None and head is not None:
        breach = _held_against(reached, head)
    return Verified(reached, breach)


def _walk(lines: Iterator[bytes], start: Head, known: Sequence[Head] = ()) -> tuple[Head, Breach | None]:
    reached = start
    for raw in lines:
        found = _next(raw, reached)
        if isinstance(found, str):
            return reached, Breach(reached.number + 1, found)
        reached = found
        for each in known:
            if reached.number == each.number and reached != each:
                return reached, _held_against(reached, each)
    return reached, None


def _held_against(reached: Head, head: Head) -> Breach | None:
    if reached == head:
        return None
    if reached.number < head.number:
        return Breach(reached.number + 1, f"missing; the ledger had {head.number} entries, {reached.number} are left")
    if reached.number > head.number:
        return Breach(head.number + 1, f"not known to the head, which ends with entry {head.number}")
    return Breach(head.number, f"its hash is {reached.hash}, where the head says {head.hash}: the chain was rewritten")


def _next(raw: bytes, before: Head) -> Head | str:
    """The head after this line; a sentence if the line does not follow."""
    if not raw.endswith(b"\n"):
        return "its line is cut off"
    try:
        entry = parse(raw[:-1].decode("ascii"))
    except (ValueError, RecursionError) as exc:
        return f"its line is not JSON ({exc})"
    if not isinstance(entry, dict) or tuple(sorted(entry)) != FIELDS:
        return f"its line has not the keys of an entry ({', '.join(FIELDS)})"
    if not _well_typed(entry):
        return "a value in its line has the wrong type"
    if (canonical(entry) + "\n").encode("ascii") != raw:
        return "its line is not written in the canonical form"
    if entry["number"] != before.number + 1:
        return f"its place is taken by entry {entry['number']}"
    if entry["previous_hash"] != before.hash:
        return f"it follows an entry with the hash {entry['previous_hash']}, and the one before it has {before.hash}"
    own_hash = str(entry.pop("hash"))
    made = seal(canonical(entry))
    if own_hash != made:
        return f"its content has the hash {made}, and it says {own_hash}"
    return Head(before.number + 1, own_hash)


def _well_typed(entry: Mapping[str, Any]) -> bool:
    texts = ("actor", "hash", "kind", "previous_hash", "rollout")
    return (
        all(isinstance(entry[name], str) for name in texts)
        and all(type(entry[name]) is int for name in ("number", "sequence"))
        and type(entry["at"]) is float
        and isinstance(entry["body"], dict)
    )


# ---------------------------------------------------------------- exports


def sign(head: Head, key: bytes) -> str:
    """The head's signature: HMAC-SHA-256 of its text, in hex. Raises ValueError for a key of less than 16 bytes."""
    if len(key) < 16:
        raise ValueError(f"a signing key of {len(key)} bytes can be guessed; use at least 16, from a random source")
    return hmac.new(key, str(head).encode("ascii"), hashlib.sha256).hexdigest()


def export(lines: Iterable[bytes], key: bytes | None = None) -> Iterator[bytes]:
    """The lines, and after them the line that holds their head, signed if there is a key.

    Raises ValueError at the first entry that does not fit: a broken ledger gets no head, and no signature.
    """
    reached = Head()
    for raw in lines:
        found = _next(raw, reached)
        if isinstance(found, str):
            raise ValueError(f"the ledger cannot be exported: {Breach(reached.number + 1, found)}")
        reached = found
        yield raw
    yield _head_line(reached, sign(reached, key) if key else "")


def verify_export(lines: Iterable[bytes], key: bytes | None = None) -> Verified:
    """Does an export hold, to its end? With a key, only an end signed with that key counts."""
    entries = _Body(iter(lines))
    reached, breach = _walk(entries, Head())
    if breach is not None:
        return Verified(reached, breach)
    place = reached.number + 1
    if entries.last is None:
        return Verified(reached, Breach(place, "the export stops without its head line: its end is missing"))
    if next(entries.lines, None) is not None:
        return Verified(reached, Breach(place, "something stands after the head line"))
    found = _head_of(entries.last)
    if found is None:
        return Verified(reached, Breach(place, "the head line is not written as an export writes it"))
    head, signature = found
    breach = _held_against(reached, head)
    given = signature.encode("utf-8", "surrogatepass")  # as texts, compare_digest takes ASCII only
    if breach is None and key is not None and not hmac.compare_digest(given, sign(head, key).encode("ascii")):
        breach = Breach(place, "the head line is not signed with this key" if signature else "the head is not signed")
    return Verified(reached, breach, signed=key is not None and breach is None)


class _Body:
    """The lines up to the head line, which is kept in `last`."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self.lines = lines
        self.last: bytes | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        raw = next(self.lines)
        if raw.startswith(b'{"head"'):
            self.last = raw
            raise StopIteration
        return raw


def _head_line(head: Head, signature: str) -> bytes:
    text = canonical({"head": {"hash": head.hash, "number": head.number, "signature": signature}})
    return f"{text}\n".encode("ascii")


def _head_of(raw: bytes) -> tuple[Head, str] | None:
    """The head and the signature of a head line; None for one with a byte more or less than `_head_line` gives it."""
    try:
        inner = parse(raw.decode("ascii"))["head"]
        head, signature = Head(inner["number"], inner["hash"]), inner["signature"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not (type(head.number) is int and isinstance(head.hash, str) and isinstance(signature, str)):
        return None
    return (head, signature) if _head_line(head, signature) == raw else None
