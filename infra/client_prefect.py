"""A client of the Prefect server, which asks once, and is made in a moment.

Whoever needs it more asks again: Prefect's own tries take minutes.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.ports import PortError

if TYPE_CHECKING:
    import httpx
    from prefect.context import SettingsContext
    from prefect.settings import Settings

_BUSY = {408, 429, 502, 503}
_made: tuple[Settings, Settings] | None = None  # Prefect's settings as they were, and those made of them


@contextmanager
def client(timeout_s: float, failed: str = "the Prefect server does not do what it is asked") -> Iterator[Any]:
    """The client, of the server that Prefect's own settings name.

    Raises PortError, with what has failed, where it does not answer within the timeout, says no, or has it no more.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

    try:
        with (
            _asking_once() as context,  # in this thread's context alone
            get_client(
                sync_client=True,
                httpx_settings={"timeout": timeout_s, "event_hooks": {"response": [_say_no]}, **_tls(context.settings)},
            ) as made,
        ):
            yield made
    except (httpx.HTTPError, PrefectHTTPStatusError) as exc:
        raise PortError(f"{failed}: {exc}") from exc
    except (ObjectAlreadyExists, ObjectNotFound) as exc:  # which say nothing themselves
        raise PortError(f"{failed}: {exc.http_exc}") from exc


def _asking_once() -> SettingsContext:
    """Prefect's settings without its own tries. Kept, as they take 20 ms to make, and a rollout makes many clients."""
    global _made
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

    here = get_settings_context()
    kept = _made
    if kept is None or kept[0] is not here.settings:
        kept = _made = here.settings, here.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})
    return SettingsContext(profile=here.profile, settings=kept[1])


def _say_no(response: httpx.Response) -> None:
    """A server that is busy says no at once: Prefect's client sleeps before a second try, also where there is none."""
    import httpx

    if response.status_code in _BUSY:
        said = f"it is busy: {response.status_code} for {response.url}"
        raise httpx.HTTPStatusError(said, request=response.request, response=response)


def _tls(settings: Settings) -> dict[str, ssl.SSLContext]:
    """What Prefect's client is given so that it reads no certificates, another 20 ms, where it speaks plain HTTP."""
    url = settings.api.url or ""
    return {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)} if url.startswith("http://") else {}
