"""What somebody with the database in hand can do to the entries of a ledger, past every trigger."""

from __future__ import annotations

from collections.abc import Iterator

COLUMNS = ("number", "rollout", "sequence", "at", "actor", "kind", "body", "previous_hash", "hash")


def edits_of(value: object) -> Iterator[object]:
    """Each bit of each byte of a text; each neighbour and each digit of a number."""
    if isinstance(value, str):
        raw = value.encode()
        for offset, byte in enumerate(raw):
            for bit in range(8):
                yield (raw[:offset] + bytes([byte ^ (1 << bit)]) + raw[offset + 1 :]).decode("latin-1")
            yield (raw[:offset] + raw[offset + 1 :]).decode()
            yield (raw[:offset] + b" " + raw[offset:]).decode()
    elif isinstance(value, int):
        yield from (value + step for step in (-1, 1, 10, 100, 2**20) if value + step != value)
    else:
        assert isinstance(value, float)
        yield from (value + 2**-20, value - 1, -value)
