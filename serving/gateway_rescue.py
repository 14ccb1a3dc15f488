"""How a second attempt waits for a server that is just being started again. Pure: parts of Envoy's configuration.

A server that was killed is back within tens of milliseconds. Until then nothing listens on its socket, and a second
attempt made at once would fail as the first one did. So second attempts go through a listener inside Envoy, which tries
to connect again and again, for `TRIES` times and some 1.7 s on average. Only what never reached a server is tried
again and again: what a server has answered is sent to no other. First attempts do not come this way.

A second attempt may itself be under way when its server dies: beside a candidate that fails, nobody else could answer
it. Then there is one more, and no further: it may be what the server died of. So there are two listeners, one
behind the other: `NAME` makes the second attempt, and once more where `DIED` says why there was no answer; `CONNECTS`
finds the server for each.

Reference: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/other_features/internal_listener.
"""

from __future__ import annotations

from typing import Any

TYPE = "type.googleapis.com/"
NAME = "rescue"
CONNECTS = "rescue-connects"
EXTENSION = {
    "name": "envoy.bootstrap.internal_listener",
    "typed_config": {"@type": TYPE + "envoy.extensions.bootstrap.internal_listener.v3.InternalListener"},
}
TRIES = 16
BACK_OFF_S = 0.02  # doubling from here; each pause is drawn between 0 and that
BACK_OFF_S_MAX = 0.25
HEADER = "x-lockgate-again"
DIED = "x-lockgate-died"  # on what Envoy itself answers where a server ended the connection without a word

Json = dict[str, Any]


def mark(again: str) -> Json:
    """The header on a route's requests that says which cluster second attempts reach, whatever a client has sent."""
    return {
        "header": {"key": HEADER, "value": again.replace("%", "%%")},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def endpoint(listener: str = NAME) -> Json:
    """The listener's address; that of the first one, as clusters of second attempts need it."""
    return {"envoy_internal_address": {"server_listener_name": listener}}


def cluster(breakers: Json, body_bytes_max: int) -> Json:
    """The way from the first listener to the second."""
    return {
        "name": CONNECTS,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": CONNECTS,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": endpoint(CONNECTS)}}]}],
        },
        "circuit_breakers": breakers,
        "per_connection_buffer_limit_bytes": body_bytes_max,
    }


def listeners(attempt_timeout: str, body_bytes_max: int) -> list[Json]:
    """Both. What they forward is unchanged; `attempt_timeout` (as Envoy writes it) bounds all tries together, where the
    route that sends them does not end them earlier."""
    once_more = {
        "retry_on": "retriable-headers",
        "retriable_headers": [{"name": DIED, "present_match": True}],
        "num_retries": 1,
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"},
    }
    until_connected = {
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
    told = {
        "filter": {"response_flag_filter": {"flags": ["UC"]}},
        "headers_to_add": [{"header": {"key": DIED, "value": "true"}}],
    }
    return [
        _listener(
            NAME,
            {
                "route": {"cluster": CONNECTS, "timeout": attempt_timeout, "retry_policy": once_more},
                "response_headers_to_remove": [DIED],
            },
            body_bytes_max,
        ),
        _listener(
            CONNECTS,
            {
                "route": {"cluster_header": HEADER, "timeout": attempt_timeout, "retry_policy": until_connected},
                "request_headers_to_remove": [HEADER],
            },
            body_bytes_max,
            local_reply_config={"mappers": [told]},
        ),
    ]


def _listener(name: str, everything: Json, body_bytes_max: int, **more: Json) -> Json:
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "HTTP1",
        "route_config": {
            "name": name,
            "virtual_hosts": [{"name": name, "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **everything}]}],
        },
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
        **more,
    }
    return {
        "name": name,
        "internal_listener": {},
        "per_connection_buffer_limit_bytes": body_bytes_max,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
