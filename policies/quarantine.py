"""Bytes that are not to serve, as entries of the ledger: put in quarantine, and lifted out of it, on the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

QUARANTINED = "quarantined"
LIFTED = "lifted"


def book(digest: str) -> str:
    """The name under which the ledger keeps what happened to these bytes (where rollouts have their own)."""
    return f"quarantine/{digest}"


def put_in(digest: str, reason: str, rollout: str) -> dict[str, Any]:
    """The body of an entry `quarantined`."""
    return {"digest": digest, "reason": reason, "rollout": rollout}


def lifted(digest: str, reason: str) -> dict[str, Any]:
    """The body of an entry `lifted`. Raises ValueError without a reason: an override says why."""
    if not reason.strip():
        raise ValueError("a quarantine is lifted for a reason, and none was given")
    return {"digest": digest, "reason": reason}


def standing(entries: Iterable[tuple[float, str, Mapping[str, Any]]]) -> dict[str, tuple[float, Mapping[str, Any]]]:
    """Of (time, kind, body) in order: what is in quarantine at the end, by digest, with the time and body."""
    kept: dict[str, tuple[float, Mapping[str, Any]]] = {}
    for at, kind, body in entries:
        if kind == QUARANTINED:
            kept.setdefault(str(body["digest"]), (at, body))
        elif kind == LIFTED:
            kept.pop(str(body["digest"]), None)
    return kept
