"""What can go wrong in the model server, as one tree. Inner errors know nothing of HTTP: `endpoints.py` maps them.

ServingError
├── CannotServe      the process must not start: the file, its bytes, the model or the address is not what was asked
└── Refused          one request is not answered with a prediction
    ├── Malformed    the bytes are not a request in the form that the client chose
    ├── OffContract  a well-formed request that does not fit the model's signature
    ├── NotThere     no such path, model or version here
    ├── WrongMethod  the path is there, but not for this method
    ├── TooLarge     more bytes than the server takes
    ├── TooSlow      the client did not send its request in time
    ├── Busy         the queue is full: try again later
    ├── Late         the deadline passed while the request waited
    └── ModelFailed  the model itself erred on this request
"""

from __future__ import annotations


class ServingError(Exception):
    """Anything that the model server says no with; `str()` is one clear sentence."""


class CannotServe(ServingError):
    """The process must not start."""


class Refused(ServingError):
    """One request is not answered with a prediction."""


class Malformed(Refused):
    """The bytes are not a request in the form that the client chose."""


class OffContract(Refused):
    """The request does not fit the model's signature. Names the input and what was expected."""

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(f"input '{name}': expected {expected}, got {got}")


class NotThere(Refused):
    """No such path, model or version here."""


class WrongMethod(Refused):
    """The path is there, but not for this method."""

    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(f"{method} is not allowed for {path}; use {allowed}")
        self.allowed = allowed


class TooLarge(Refused):
    """More bytes than the server takes."""


class TooSlow(Refused):
    """The client did not send its request in time."""


class Busy(Refused):
    """The queue is full."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"the queue is full ({limit} {what}); try again after the time in Retry-After")


class Late(Refused):
    """The deadline passed while the request waited."""

    def __init__(self, waited_ms: float) -> None:
        super().__init__(f"the request's deadline passed after {waited_ms:.0f} ms in the queue")


class ModelFailed(Refused):
    """The model itself erred on this request."""
