"""A client of the Prefect server, which asks once.

Whoever needs it more asks again: Prefect's own tries take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tasks.ports import PortError


@contextmanager
def client(timeout_s: float, failed: str = "the Prefect server does not do what it is asked") -> Iterator[Any]:
    """The client, of the server that Prefect's own settings name.

    Raises PortError, with what has failed, where it does not answer within the timeout, says no, or has it no more.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),  # in this thread's context alone
            get_client(sync_client=True, httpx_settings={"timeout": timeout_s}) as made,
        ):
            yield made
    except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
        raise PortError(f"{failed}: {exc}") from exc
    except (ObjectAlreadyExists, ObjectNotFound) as exc:  # which say nothing themselves
        raise PortError(f"{failed}: {exc.http_exc}") from exc
