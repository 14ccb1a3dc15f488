"""What the node agent answers when it cannot do what it was asked.

AgentError                  something failed here; `status` is what the API answers with
├── BadRequest        400   the request cannot be understood, or names a file that cannot be used
├── NotDeployed       404   no such version here
├── Conflict          409   understood, and refused: a stale epoch, a lost lease
├── NotReady          503   refused for now: too few replicas are ready, and are being started
├── NotInForce        503   kept, but the gateway has not confirmed it in time
└── NotDurable        507   could not be written to disk, hence not done
StartError                  the agent cannot start at all (exit code 2)
"""

from __future__ import annotations

from typing import Any


class AgentError(Exception):
    """Something failed; `facts` go into the answer beside the sentence."""

    status = 500

    def __init__(self, sentence: str, **facts: Any) -> None:
        super().__init__(sentence)
        self.facts = facts


class BadRequest(AgentError):
    """The request cannot be used as it is."""

    status = 400


class NotDeployed(AgentError):
    """There is no such version here."""

    status = 404

    def __init__(self, model: str, version: str) -> None:
        super().__init__(f"version {version} of {model} is not deployed here; deploy it first")


class Conflict(AgentError):
    """Understood and refused."""

    status = 409


class NotReady(AgentError):
    """Refused as long as too few replicas are ready; one that was killed is back in no time."""

    status = 503


class NotInForce(AgentError):
    """Written down and kept, but not confirmed by the gateway in time."""

    status = 503


class NotDurable(AgentError):
    """Could not be written to disk."""

    status = 507


class StartError(Exception):
    """The agent cannot start; the sentence says what would mend it."""
