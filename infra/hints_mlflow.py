"""MLflow's webhooks: what makes one believable, and how the registry is told where to send them.

The signature is `v1,base64(HMAC-SHA256(secret, "id.timestamp.body"))` (mlflow.webhooks.delivery, after the Standard
Webhooks specification). A hint that is believed says only that something has changed in the registry.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra import errors_mlflow

EVENTS = (
    "model_version.created",
    "model_version_alias.created",
    "model_version_tag.set",
)
_NAME = "lockgate"
_AGE_S = 300.0
_AHEAD_S = 60.0  # clocks differ
_REMEMBERED = 100_000


class Unbelievable(Exception):
    """The hint is not acted upon; `why` is one of forged, stale, replayed, malformed."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass
class Doorkeeper:
    """Believes a hint that is signed, fresh, and seen for the first time.

    `since` (POSIX seconds) is when this one began: what was signed before may have been seen by its predecessor.
    """

    secret: str
    since: float
    _seen: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def believe(self, headers: Mapping[str, str], body: bytes, now: float) -> None:
        """Remembers the hint. Raises Unbelievable, whose `why` says for what."""
        name = {
            "id": "X-MLflow-Delivery-Id",
            "stamp": "X-MLflow-Timestamp",
            "signature": "X-MLflow-Signature",
        }
        given = {key: headers.get(header, "") for key, header in name.items()}
        right = signature(self.secret, given["id"], given["stamp"], body)
        if not hmac.compare_digest(right, given["signature"].encode()):
            raise Unbelievable("forged")
        try:
            stamp = float(given["stamp"])
            model = json.loads(body)["data"]["name"]
        except (ValueError, KeyError, TypeError) as exc:
            raise Unbelievable("malformed") from exc
        if not isinstance(model, str):
            raise Unbelievable("malformed")
        if not max(now - _AGE_S, int(self.since)) <= stamp <= now + _AHEAD_S:
            raise Unbelievable("stale")
        if given["id"] in self._seen:
            raise Unbelievable("replayed")
        self._remember(given["id"], now)

    def _remember(self, delivery: str, now: float) -> None:
        self._seen[delivery] = now
        oldest = next(iter(self._seen.values()))
        while len(self._seen) > _REMEMBERED or oldest < now - _AGE_S - _AHEAD_S:
            self._seen.popitem(last=False)
            oldest = next(iter(self._seen.values()), now)


def signature(secret: str, delivery: str, stamp: str, body: bytes) -> bytes:
    """What MLflow writes into X-MLflow-Signature."""
    signed = f"{delivery}.{stamp}.".encode() + body
    return b"v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest())


def subscribe(uri: str, cache: Path, url: str, secret: str) -> None:
    """The registry at `uri` sends its hints to `url`, signed with the secret. Idempotent. Raises PortError."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with errors_mlflow.asking(f"have hints sent to {url}", uri, cache):
        mine = [hook for hook in client.list_webhooks(max_results=100) if hook.name == _NAME]
        for hook in mine[1:]:
            client.delete_webhook(hook.webhook_id)
        if mine:
            client.update_webhook(mine[0].webhook_id, url=url, events=list(EVENTS), secret=secret, status="ACTIVE")
        else:
            client.create_webhook(_NAME, url, list(EVENTS), description="lockgate's trigger receiver", secret=secret)


def subscribed(uri: str, cache: Path, url: str) -> bool:
    """Whether the registry sends its hints to `url` now. Raises PortError."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with errors_mlflow.asking("say where hints are sent", uri, cache):
        hooks = client.list_webhooks(max_results=100)
        return any(hook.url == url and str(hook.status) == "ACTIVE" for hook in hooks)
