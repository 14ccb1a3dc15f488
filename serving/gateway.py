"""The gateway's configuration: routes and endpoints in, Envoy's own resources out. Pure: nothing is read or written.

Per deployed version there are four clusters, so that what happens for different reasons is counted apart:

    live/MODEL/VERSION     first attempts of clients' requests
    shadow/MODEL/VERSION   copies of requests; bounded hard, since nobody waits for the answers
    rescue/MODEL/VERSION   second attempts, made on the stable version
    again/MODEL/VERSION    the servers that second attempts reach, see `gateway_rescue.py`

A client's request goes to `arm/MODEL/VERSION+STABLE`, an aggregate cluster of the version's live cluster and the stable
version's rescue cluster. The retry policy moves a failed attempt on to the next priority, i.e. to the rescue cluster.
The arm counts how many requests were answered and how many needed the second attempt. Both arms of a split have this
shape, so a failure counts once per request in either, and the comparison stays fair.

What is not split by chance (`gateway_routes.py`) goes to `ruled/MODEL/VERSION+STABLE`, an aggregate like the arm:
counted apart, since it would spoil the comparison.

Reference: Envoy 1.40 API v3, https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import PurePath
from typing import Any
from urllib.parse import quote, urlsplit

import orjson

from policies.evidence import LATENCY_EDGES_MS
from policies.traffic import TIMEOUT_S, TIMEOUT_S_MAX
from serving import gateway_rescue
from serving.gateway_rescue import TYPE

VERSION_HEADER = "x-lockgate-version"
ROUTES = "models"  # the name of the one route configuration
STAT_PREFIX = "gateway"
ADMIN_SOCKET = "admin.sock"

Json = dict[str, Any]


@dataclass(frozen=True)
class GatewaySettings:
    """What holds for all models. Durations in seconds, sizes in bytes.

    `attempt_timeout_s` bounds one attempt (then the stable version is asked) and a copy, `request_timeout_s` the whole
    request; a route may say otherwise. What takes longer than `LATENCY_EDGES_MS[-1]` could not be
    counted by its latency. A body beyond `body_bytes_max` is refused with 413: it could not be sent a second time.
    A version that has `requests_max` under way gets no more: 503, at once.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    request_timeout_s: float = TIMEOUT_S
    attempt_timeout_s: float = 5.0
    body_bytes_max: int = 32 * 1024 * 1024  # the model server's own default
    requests_max: int = 10_000
    shadow_requests_max: int = 256
    connections_max: int = 20_000
    access_log: str | None = None


@dataclass(frozen=True)
class Backend:
    """One version of a model and where its replicas listen: `unix:/path` or `http://host:port`. `attempt_s` is how
    long a copy is waited for, as long as for an attempt on the model's route; None: as the gateway's settings say."""

    model: str
    version: str
    endpoints: tuple[str, ...]
    attempt_s: float | None = None


def cluster_name(role: str, model: str, version: str) -> str:
    """The cluster that counts what `role` (live, shadow, rescue, again) does on the version.

    Dots, slashes and colons are escaped: Envoy builds the names of its statistics from these parts.
    """
    return "/".join([role, _escaped(model), _escaped(version)])


def arm_name(model: str, version: str, stable: str | None) -> str:
    """The aggregate cluster that asks `version` first and the stable version if that fails."""
    return f"arm/{_escaped(model)}/{_escaped(version)}+{_escaped(stable or version)}"


def ruled_name(model: str, version: str, stable: str | None) -> str:
    """The same as the arm, for requests that were not split by chance."""
    return "ruled" + arm_name(model, version, stable).removeprefix("arm")


def arm_pattern(model: str, version: str) -> str:
    """A regular expression (RE2) for the names of the version's arms, whatever the stable version beside it."""
    return rf"arm/{_escaped(model)}/{_escaped(version)}\+[^.]*"


def _escaped(part: str) -> str:
    return quote(part, safe="-_").replace(".", "%2E").replace("~", "%7E")


def content_version(resources: object) -> str:
    """A name for exactly this content, by which Envoy says which content is in force."""
    return hashlib.sha256(orjson.dumps(resources, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def discovery(resources: list[Json], version: str) -> bytes:
    """The file form of a set of resources, as Envoy reads it."""
    return orjson.dumps({"version_info": version, "resources": resources}, option=orjson.OPT_INDENT_2)


# --- clusters -------------------------------------------------------------------------------------------------------


def cluster_resources(backends: Iterable[Backend], settings: GatewaySettings) -> list[Json]:
    """The clusters of all deployed versions, and an arm for each of them with each as the stable version.

    Of the routes they depend on the time-outs alone, so a change of traffic touches only the route table, no statistics
    begin anew within a rollout, and requests that are under way on a former route find their second attempt.
    """
    found: dict[str, Json] = {}
    versions: dict[str, list[str]] = {}
    for backend in backends:
        versions.setdefault(backend.model, []).append(backend.version)
        for role in ("live", "rescue", "again", "shadow"):
            cluster = _cluster(role, backend, settings)
            found[cluster["name"]] = cluster
    for model, deployed in versions.items():
        for version, stable in product(deployed, deployed):
            for name in (arm_name(model, version, stable), ruled_name(model, version, stable)):
                found[name] = _arm(name, model, version, stable)
    return [found[name] for name in sorted(found)]


def _cluster(role: str, backend: Backend, settings: GatewaySettings) -> Json:
    name = cluster_name(role, backend.model, backend.version)
    limit = settings.shadow_requests_max if role == "shadow" else settings.requests_max
    http: Json = {"explicit_http_config": {"http_protocol_options": {}}}
    # Shorter than the model server's own idle time-out, so that it never closes a connection that is being used.
    http["common_http_protocol_options"] = {"idle_timeout": "20s"}
    if role == "again":
        # A dying process closes its listener first and its connections later: a new connection never meets a dead one.
        http["common_http_protocol_options"]["max_requests_per_connection"] = 1
    if role == "shadow":
        waited_s = settings.attempt_timeout_s if backend.attempt_s is None else backend.attempt_s
        http["common_http_protocol_options"]["max_stream_duration"] = duration(waited_s)
    addresses = [gateway_rescue.endpoint()] if role == "rescue" else [_address(url) for url in backend.endpoints]
    endpoints = [_endpoint(address, backend.version) for address in addresses]
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        "circuit_breakers": _breakers(limit),
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "outlier_detection": _outliers(),
        "per_connection_buffer_limit_bytes": settings.body_bytes_max,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                **http,
            }
        },
    }


def _outliers() -> Json:
    """A replica that keeps failing is left out for some seconds; the last one never is: what it does is evidence."""
    return {
        "consecutive_5xx": 5,
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 100,
        "enforcing_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "2s",
        "max_ejection_time": "20s",
        "max_ejection_percent": 50,
    }


def _breakers(limit: int) -> Json:
    """The servers bound their own queues and say so with 429; these limits are for servers that say nothing at all."""
    bounds = {"max_connections": limit, "max_pending_requests": limit, "max_requests": limit, "max_retries": limit}
    return {"thresholds": [{"priority": "DEFAULT", **bounds}]}


def _endpoint(address: Json, version: str) -> Json:
    """The address, carrying its version: the answer's header names the version that really answered."""
    return {
        "endpoint": {"address": address},
        "metadata": {"filter_metadata": {"lockgate": {"version": version}}},
    }


def _address(url: str) -> Json:
    if url.startswith("unix:"):
        return {"pipe": {"path": url.removeprefix("unix:")}}
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise ValueError(f"'{url}' is no endpoint; write unix:/path or http://host:port")
    return {"socket_address": {"address": parts.hostname, "port_value": parts.port}}


def _arm(name: str, model: str, version: str, stable: str) -> Json:
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": name,
        "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED",
        "circuit_breakers": _breakers(100_000),
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {
                "@type": TYPE + "envoy.extensions.clusters.aggregate.v3.ClusterConfig",
                "clusters": [cluster_name("live", model, version), cluster_name("rescue", model, stable)],
            },
        },
    }


# --- bootstrap ------------------------------------------------------------------------------------------------------


def bootstrap(settings: GatewaySettings, folder: PurePath) -> Json:
    """What Envoy is started with. It reads `folder`/clusters/clusters.json and `folder`/routes/routes.json, and again
    whenever a file is renamed into those folders. Its admin interface, which could end it, is a socket in `folder`."""
    longest_s = max(settings.attempt_timeout_s, TIMEOUT_S_MAX / 2)  # of all routes' attempts; each bounds its own
    rescue = gateway_rescue.listeners(duration(longest_s), settings.body_bytes_max)
    return {
        "node": {"id": "lockgate", "cluster": "lockgate"},
        "admin": {"address": {"pipe": {"path": str(folder / ADMIN_SOCKET), "mode": 0o600}}},
        "dynamic_resources": {"cds_config": _watched(folder / "clusters", "clusters.json")},
        "static_resources": {
            "listeners": [_listener(settings, folder), *rescue],
            "clusters": [gateway_rescue.cluster(_breakers(100_000), settings.body_bytes_max)],
        },
        "bootstrap_extensions": [gateway_rescue.EXTENSION],
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": TYPE
                        + "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": settings.connections_max,
                    },
                }
            ]
        },
        "stats_flush_interval": "0.5s",  # histograms are merged on flush only
        "stats_config": {
            "histogram_bucket_settings": [
                {"match": {"suffix": "upstream_rq_time"}, "buckets": list(LATENCY_EDGES_MS)},
            ]
        },
        "layered_runtime": {
            # A rule with many values is one expression, which Envoy thinks large beyond 100 instructions.
            "layers": [{"name": "static", "static_layer": {"re2.max_program_size.error_level": 1_000_000}}]
        },
    }


def _listener(settings: GatewaySettings, folder: PurePath) -> Json:
    manager: Json = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "codec_type": "AUTO",
        "rds": {"route_config_name": ROUTES, "config_source": _watched(folder / "routes", "routes.json")},
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "use_remote_address": True,
        "stream_idle_timeout": duration(settings.request_timeout_s + 45),
        "request_timeout": duration(settings.request_timeout_s + 45),
        "request_headers_timeout": "10s",
        "drain_timeout": "2s",
        "normalize_path": True,
        "common_http_protocol_options": {"idle_timeout": "300s"},
        "http_filters": [
            {
                # Whole bodies only, bounded: what has been buffered can be sent a second time; beyond it is 413.
                "name": "envoy.filters.http.buffer",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.filters.http.buffer.v3.Buffer",
                    "max_request_bytes": settings.body_bytes_max,
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            },
        ],
    }
    if settings.access_log is not None:
        manager["access_log"] = [_access_log(settings.access_log)]
    return {
        "name": STAT_PREFIX,
        "address": _socket(settings.host, settings.port),
        # Without this a second Envoy could listen on the same port and silently take half of the requests.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": settings.body_bytes_max,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _access_log(path: str) -> Json:
    fields: Mapping[str, str] = {
        "time": "%START_TIME%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "version": "%UPSTREAM_METADATA(lockgate:version)%",
        "ms": "%DURATION%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
    }
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": TYPE + "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": path,
            "log_format": {"json_format": dict(fields)},
        },
    }


def _socket(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _watched(folder: PurePath, name: str) -> Json:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(folder / name), "watched_directory": {"path": str(folder)}},
    }


def duration(seconds: float) -> str:
    return f"{seconds:.3f}s"
