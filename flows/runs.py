"""Flow runs on the Prefect server, as the triggers see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flows.deployments import POOL
from flows.triggers import REGISTRY, Wish
from policies.triggers import Run
from tasks.ports import PortError


class PrefectRuns:
    """`flows.triggers.Runs` on the Prefect server that the environment names."""

    def of(self, wish: Wish) -> Sequence[Run]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
        from prefect.client.schemas.sorting import FlowRunSort

        with _client() as client:
            found = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[_tag(wish)])),
                sort=FlowRunSort.START_TIME_ASC,
            )
        return [_run(each) for each in sorted(found, key=lambda each: each.created)]

    def start(self, wish: Wish, number: int) -> None:
        with _client() as client:
            deployment = client.read_deployment_by_name("deliver/deliver")
            client.create_flow_run_from_deployment(
                deployment.id,
                parameters={
                    "model": wish.model,
                    "version": int(wish.version),
                    "policy": wish.policy,
                    "reason": f"{wish.why} in the registry",
                    "by": REGISTRY,
                },
                name=f"{wish.model} v{wish.version} → local: asked for by the registry",
                tags=[POOL, _tag(wish)],
                idempotency_key=f"{wish.key}#{number}",
            )


def _tag(wish: Wish) -> str:
    return f"asked: {wish.key}"


def _run(found: Any) -> Run:
    state = found.state
    ended = state.timestamp.timestamp() if state is not None and state.is_final() else None
    return Run(ended, state is not None and state.is_cancelled())


@contextmanager
def _client() -> Iterator[Any]:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            yield client
    except ObjectNotFound as exc:
        raise PortError("the Prefect server has no deployment deliver/deliver yet; the worker brings it") from exc
    except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
        raise PortError(f"the Prefect server does not answer: {exc}") from exc
