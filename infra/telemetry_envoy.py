"""Counts per version, read from the local gateway and the model servers.

Of clients' requests (`live`), from the version's arm in Envoy (see `serving/gateway.py`):

    requests   upstream_rq_completed: answered, by whichever attempt
    errors     upstream_rq_retry + upstream_rq_retry_overflow: the first attempt, made on this version, failed (5xx,
               reset, timed out, not connected); whether the stable version then answered makes no difference here
    latency    upstream_rq_time: what the client waited for, a second attempt included

Of copies (`shadow`), from the version's shadow cluster: answered or timed out; 5xx (Envoy also counts a copy that could
not be sent as 503) or timed out. Envoy's latency is in whole milliseconds, and its histograms trail its counters by up
to half a second. All are counters that never fall while the gateway runs; `epoch` names its process.

The prediction histogram comes from the servers' own `/metrics`. What a server counted before it ended is kept.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from infra.agent_client import AgentClient, AgentError
from infra.connection_unix import ask
from policies.evidence import LATENCY_EDGES_MS, SCORE_EDGES, Counts
from serving.gateway import arm_pattern, cluster_name
from tasks.ports import PortError

Role = Literal["live", "shadow"]

TIMEOUT_S = 2.0
_EPOCH = re.compile(r'^lockgate_process_epoch\{.*\bepoch="([^"]*)"', re.MULTILINE)
_SCORE = re.compile(r'^lockgate_prediction_bucket\{.*\ble="([^"]*)".*\} ([0-9.e+]+)', re.MULTILINE)


class EnvoyCounts:
    """The counts of one agent's gateway and servers. Several rollouts may ask, each from a thread of its own."""

    def __init__(self, agent_home: Path) -> None:
        self._agent = AgentClient(agent_home, timeout_s=5.0)
        self._scores: dict[tuple[str, str], _Scores] = {}

    def counts(self, model: str, version: str, role: Role = "live") -> Counts:
        """Cumulative counters of the version in that role; zeros before its first request.

        Raises PortError if the agent or the gateway cannot be asked. A server that does not answer is no error here:
        what clients saw of it is in the gateway's counters.
        """
        try:
            status = self._agent.status()
        except AgentError as exc:
            raise PortError(f"the counts of {model} v{version} cannot be read: {exc}") from exc
        gateway = status["gateway"]
        stats = _stats(gateway["admin"], _pattern(model, version, role))
        live = role == "live"
        timed_out = stats.total("upstream_rq_max_duration_reached")
        requests = stats.total("upstream_rq_completed") + (0 if live else timed_out)
        failed = ("upstream_rq_retry", "upstream_rq_retry_overflow") if live else ("upstream_rq_5xx",)
        errors = sum(stats.total(name) for name in failed) + (0 if live else timed_out)
        deployed = status["models"].get(model, {}).get("versions", {}).get(version, {})
        return Counts(
            requests=requests,
            errors=min(errors, requests),  # a request that failed once may still be under way
            latency=stats.latency,
            scores=self._scores.setdefault((model, version), _Scores()).read(deployed.get("replicas", ())),
            epoch=f"{gateway['pid']}-{gateway['started_at']:.0f}",
        )


def _stats(admin: str, pattern: str) -> _Stats:
    """What Envoy has counted under the names that fit. Raises PortError."""
    if not admin:
        raise PortError("the gateway is not running, so its counters cannot be read")
    target = f"/stats?format=json&usedonly&histogram_buckets=disjoint&filter={quote(pattern, safe='')}"
    try:
        status, body = ask(admin, "GET", target, TIMEOUT_S)
        if status != 200:
            raise ValueError(f"status {status}")
        return _parsed(json.loads(body))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
        raise PortError(f"the gateway's counters at {admin} cannot be read: {exc!r}") from exc


@dataclass
class _Stats:
    """Counters and the latency histogram, summed over the clusters that were asked for."""

    counters: dict[str, int] = field(default_factory=dict)
    latency: tuple[int, ...] = (0,) * (len(LATENCY_EDGES_MS) + 1)

    def total(self, name: str) -> int:
        return self.counters.get(name, 0)


def _pattern(model: str, version: str, role: Role) -> str:
    """A regular expression (RE2) for the names of the statistics that count here."""
    cluster = arm_pattern(model, version) if role == "live" else cluster_name("shadow", model, version)
    names = "completed|5xx|retry|retry_overflow|max_duration_reached|time"
    return rf"^cluster\.{cluster}\.upstream_rq_({names})$"


def _parsed(body: Mapping[str, Any]) -> _Stats:
    stats = _Stats()
    for entry in body["stats"]:
        if "name" in entry:
            name = entry["name"].rsplit(".", 1)[1]
            stats.counters[name] = stats.total(name) + int(entry["value"])
        for histogram in entry.get("histograms", ()):
            if "buckets" in histogram:
                stats.latency = _added(stats.latency, _buckets(histogram["buckets"]))
    return stats


def _buckets(buckets: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """Envoy's disjoint buckets on our edges. Nothing lies beyond the last: a request may not take that long."""
    found = {round(float(bucket["upper_bound"]), 4): int(bucket["cumulative"]) for bucket in buckets}
    return (*(found.get(edge, 0) for edge in LATENCY_EDGES_MS), 0)


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


class _Scores:
    """The prediction histogram of one version over all of its processes, those that have ended included."""

    def __init__(self) -> None:
        self._by_process: dict[str, tuple[int, ...]] = {}

    def read(self, replicas: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
        """The histogram as far as it is known; () before anything is."""
        for replica in replicas:
            text = _metrics(str(replica["endpoint"]))
            epoch = _EPOCH.search(text)
            if epoch is not None:
                self._by_process[epoch[1]] = _histogram(text)
        total: tuple[int, ...] = ()
        for counted in self._by_process.values():
            total = _added(total, counted) if total else counted
        return total


def _metrics(endpoint: str) -> str:
    """What a server says of itself; nothing if it does not answer."""
    try:
        status, body = ask(endpoint, "GET", "/metrics", TIMEOUT_S)
    except (OSError, http.client.HTTPException):
        return ""
    return body.decode() if status == 200 else ""


def _histogram(text: str) -> tuple[int, ...]:
    """Prometheus' cumulative buckets as counts per bucket of `SCORE_EDGES`."""
    cumulative: dict[float, float] = {}
    for edge, count in _SCORE.findall(text):
        cumulative[float(edge)] = cumulative.get(float(edge), 0.0) + float(count)
    counts, below = [], 0.0
    for edge in (*SCORE_EDGES, float("inf")):
        upto = max(below, cumulative.get(edge, below))
        counts.append(int(upto - below))
        below = upto
    return tuple(counts)
