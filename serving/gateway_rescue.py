"""How a second attempt waits for a server that is just being started again. Pure: parts of Envoy's configuration.

A server that was killed is back within tens of milliseconds. Until then nothing listens on its socket, and a second
attempt made at once would fail as the first one did. So second attempts go through a listener inside Envoy, which tries
to connect again and again, for `TRIES` times and some 1.7 s on average. Only what never reached a server is tried
again: a request that its server answered, or died of, is sent no third time. First attempts do not come this way.

Reference: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/other_features/internal_listener.
"""

from __future__ import annotations

from typing import Any

TYPE = "type.googleapis.com/"
NAME = "rescue"
EXTENSION = {
    "name": "envoy.bootstrap.internal_listener",
    "typed_config": {"@type": TYPE + "envoy.extensions.bootstrap.internal_listener.v3.InternalListener"},
}
TRIES = 16
BACK_OFF_S = 0.02  # doubling from here; each pause is drawn between 0 and that
BACK_OFF_S_MAX = 0.25
HEADER = "x-lockgate-again"

Json = dict[str, Any]


def mark(again: str) -> Json:
    """The header on a route's requests that says which cluster second attempts reach, whatever a client has sent."""
    return {
        "header": {"key": HEADER, "value": again.replace("%", "%%")},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def endpoint() -> Json:
    """The listener's address."""
    return {"envoy_internal_address": {"server_listener_name": NAME}}


def listener(attempt_timeout: str, body_bytes_max: int) -> Json:
    """The listener. What it forwards is unchanged; `attempt_timeout` (as Envoy writes it) bounds all tries together."""
    retries = {
        "retry_on": "connect-failure,refused-stream,reset-before-request",
        "num_retries": TRIES,
        "retry_back_off": {"base_interval": f"{BACK_OFF_S}s", "max_interval": f"{BACK_OFF_S_MAX}s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                },
            }
        ],
        "host_selection_retry_max_attempts": 3,
    }
    everything = {
        "match": {"prefix": "/"},
        "route": {"cluster_header": HEADER, "timeout": attempt_timeout, "retry_policy": retries},
        "request_headers_to_remove": [HEADER],
    }
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": NAME,
        "codec_type": "HTTP1",
        "route_config": {"name": NAME, "virtual_hosts": [{"name": NAME, "domains": ["*"], "routes": [everything]}]},
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "skip_xff_append": True,
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    return {
        "name": NAME,
        "internal_listener": {},
        "per_connection_buffer_limit_bytes": body_bytes_max,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
