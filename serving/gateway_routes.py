"""The route table in Envoy's form: whom each path of each model asks, whom next, and who gets a copy. Pure.

The split is by hash of the route's key, a header or a cookie (else of the request id). Envoy takes hash modulo 100 and
walks the clusters in order; the candidate comes first, so whoever is in it at 5 % is in it at every higher weight.

What is not left to the split, by the route's rules or since the path names a version, goes to `ruled/MODEL/...`, and is
marked so that the server keeps no sample of it: it was not drawn by chance, so it must not be in what the two versions
are compared by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

from policies.traffic import APART_HEADER, WAIT_HEADER, Route, Rule
from serving import gateway_rescue
from serving.gateway import (
    ROUTES,
    VERSION_HEADER,
    GatewaySettings,
    Json,
    arm_name,
    cluster_name,
    duration,
    ruled_name,
)
from serving.gateway_rescue import TYPE

MODEL_HEADER = "x-lockgate-model"


def route_resources(routes: Iterable[Route], settings: GatewaySettings) -> list[Json]:
    """The one route configuration: every model that has a stable version or a candidate with all of the traffic."""
    served = sorted((route for route in routes if route.stable or route.candidate), key=lambda route: route.model)
    entries: list[Json] = [
        _fixed("/v2/health/live", 200, {"live": True}),
        _fixed("/v2/health/ready", 200, {"ready": True}),
    ]
    for route in served:
        entries += _model_entries(route, settings, alone=len(served) == 1)
    known = ", ".join(route.model for route in served) or "none"
    entries.append(_not_served(known))
    return [
        {
            "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
            "name": ROUTES,
            "virtual_hosts": [{"name": ROUTES, "domains": ["*"], "routes": entries}],
            "validate_clusters": False,
            "request_headers_to_remove": [APART_HEADER],  # a client has no say in it
            "most_specific_header_mutations_wins": True,
            "response_headers_to_add": [
                {
                    "header": {"key": VERSION_HEADER, "value": "%UPSTREAM_METADATA(lockgate:version)%"},
                    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                }
            ],
        }
    ]


def _model_entries(route: Route, settings: GatewaySettings, alone: bool) -> list[Json]:
    """The paths of one model, the first that fits decides: who stays with the stable version, paths that name a
    version, who goes to the candidate, and the split of all others."""
    matches = _matches(route.model, alone)
    entries: list[Json] = []
    if route.stable is not None and route.candidate is not None and (route.weight or route.shadow):
        held = _ruled(route, route.stable, settings)
        entries += [{**_narrowed(match, rule), **held} for rule in _to(route, "stable") for match in matches]
        entries += _pinned_entries(route, settings)
        if 0 < route.weight < 100:
            sent = _ruled(route, route.candidate, settings)
            entries += [{**_narrowed(match, rule), **sent} for rule in _to(route, "candidate") for match in matches]
    action = _action(route, settings)
    return [*entries, *({"match": match, **action} for match in matches)]


def _matches(model: str, alone: bool) -> list[Json]:
    """A model's paths: Open Inference Protocol, TF Serving, MLflow with the model in a header. MLflow's form names no
    model; where there is a single one there is no doubt."""
    in_path = quote(model, safe="-_.~")
    header = {"name": MODEL_HEADER, "string_match": {"exact": model}}
    return [
        {"path_separated_prefix": f"/v2/models/{in_path}"},
        {"safe_regex": {"regex": f"/v1/models/{re.escape(in_path)}([/:].*)?"}},
        {"path": "/invocations", "headers": [header]},
        *([{"path": "/invocations"}] if alone else []),
    ]


def _to(route: Route, whom: str) -> list[Rule]:
    return [rule for rule in route.rules if rule.to == whom]


def _narrowed(match: Json, rule: Rule) -> Json:
    """The match for those requests only to which the rule applies."""
    values = "|".join(re.escape(value) for value in rule.values)
    if rule.key.kind == "cookie":
        regex = rf"(.*;\s*)?{re.escape(rule.key.name)}=({values})(\s*;.*)?"
        matcher: Json = {"name": "cookie", "string_match": {"safe_regex": {"regex": regex}}}
    elif len(rule.values) == 1:
        matcher = {"name": rule.key.name, "string_match": {"exact": rule.values[0]}}
    else:
        matcher = {"name": rule.key.name, "string_match": {"safe_regex": {"regex": values}}}
    return {"match": {**match, "headers": [*match.get("headers", []), matcher]}}


def _pinned_entries(route: Route, settings: GatewaySettings) -> list[Json]:
    """A path that names a version goes to that one if it answers clients, and to the stable version (or whoever answers
    alone) if it names any other: the split would send it, and a copy, to a server that does not know it."""
    in_path = quote(route.model, safe="-_.~")
    answering = [version for version, _ in shares(route)]
    entries: list[Json] = []
    for version in answering:
        pinned = _ruled(route, version, settings)
        tail = f"versions/{quote(version, safe='-_.~')}"
        regex = f"/v1/models/{re.escape(in_path)}/{re.escape(tail)}([/:].*)?"
        entries.append({"match": {"path_separated_prefix": f"/v2/models/{in_path}/{tail}"}, **pinned})
        entries.append({"match": {"safe_regex": {"regex": regex}}, **pinned})
    other = _ruled(route, answering[-1], settings)
    return [
        *entries,
        *({"match": {"prefix": f"/{form}/models/{in_path}/versions/"}, **other} for form in ("v2", "v1")),
    ]


def _action(route: Route, settings: GatewaySettings) -> Json:
    """The split of a model's requests, and the copies."""
    weighted = [
        {"name": arm_name(route.model, version, route.stable), "weight": weight} for version, weight in shares(route)
    ]
    action = _asked(route, weighted, settings)
    copied = shadowed(route)
    if copied is not None:
        action["request_mirror_policies"] = [
            {
                "cluster": cluster_name("shadow", route.model, copied),
                "runtime_fraction": {"default_value": {"numerator": route.shadow, "denominator": "HUNDRED"}},
                "trace_sampled": False,
                "disable_shadow_host_suffix_append": True,
            }
        ]
    return {"route": action, "request_headers_to_add": _headers(route, shares(route)[-1][0], settings)}


def _headers(route: Route, alone: str, settings: GatewaySettings) -> list[Json]:
    """Whom second attempts reach: the stable version, or whoever answers alone; and how long an attempt is waited for,
    unless the client says itself how long it waits: a server runs nothing that nobody waits for any more."""
    wait = {"key": WAIT_HEADER, "value": str(round(times_s(route, settings)[1] * 1000))}
    again = gateway_rescue.mark(cluster_name("again", route.model, route.stable or alone))
    return [again, {"header": wait, "append_action": "ADD_IF_ABSENT"}]


def times_s(route: Route, settings: GatewaySettings) -> tuple[float, float]:
    """How long the whole request and one attempt may take. The route's own time-out leaves both attempts the same."""
    if route.timeout_s is not None:
        return route.timeout_s, route.timeout_s / 2
    return settings.request_timeout_s, settings.attempt_timeout_s


def _ruled(route: Route, version: str, settings: GatewaySettings) -> Json:
    """All to one version, uncopied, and counted apart."""
    weighted = [{"name": ruled_name(route.model, version, route.stable), "weight": 100}]
    apart = {"header": {"key": APART_HEADER, "value": "true"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    return {
        "route": _asked(route, weighted, settings),
        "request_headers_to_add": [apart, *_headers(route, version, settings)],
    }


def _asked(route: Route, weighted: list[Json], settings: GatewaySettings) -> Json:
    """One of the clusters is asked, by the hash of whose request it is, and then the stable version."""
    whole_s, attempt_s = times_s(route, settings)
    key = (
        {"header": {"header_name": route.key.name}}
        if route.key.kind == "header"
        else {"cookie": {"name": route.key.name}}
    )
    return {
        "weighted_clusters": {"clusters": weighted, "use_hash_policy": True},
        "hash_policy": [{**key, "terminal": True}, {"header": {"header_name": "x-request-id"}}],
        "timeout": duration(whole_s),
        "retry_policy": {
            "retry_on": "5xx,reset,connect-failure,refused-stream,retriable-status-codes",
            # A candidate with too little room answers 429; the stable version has room for what it had before.
            "retriable_status_codes": [429] if route.weight > 0 and route.stable is not None else [],
            "num_retries": 1,
            "per_try_timeout": duration(attempt_s),
            "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"},
            "retry_priority": {
                "name": "envoy.retry_priorities.previous_priorities",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    "update_frequency": 1,
                },
            },
        },
    }


def shares(route: Route) -> list[tuple[str, int]]:
    """Which version gets how many percent of the clients' requests, the candidate first; only those that get some."""
    both = [(route.candidate, route.weight), (route.stable, 100 - route.weight)]
    return [(version, weight) for version, weight in both if version is not None and weight > 0]


def shadowed(route: Route) -> str | None:
    """The version that gets copies: the candidate, or the stable version once the candidate answers everything.

    Envoy copies a route's requests whichever cluster answers them: with a weight between 1 and 99 as well, the
    candidate would get copies of what it answers itself, too. No rollout asks for both.
    """
    if route.shadow == 0:
        return None
    return route.stable if route.weight == 100 else route.candidate


def _fixed(path: str, status: int, body: Json) -> Json:
    return {"match": {"path": path}, "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}}}


def _not_served(known: str) -> Json:
    if len(known) > 2000:  # Envoy's limit for a direct response is 4096 bytes
        known = known[:2000] + " ..."
    body = json.dumps({"error": f"no model is served under this path; served here: {known}"})
    return {"match": {"prefix": "/"}, "direct_response": {"status": 404, "body": {"inline_string": body}}}
