"""What MLflow, requests, urllib3 or the disk raise, as the port's errors with a sentence for each.

not there -> NotThere, not allowed -> Refused, not acceptable -> BadInput, anything else -> PortError.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.rows import first_line
from tasks.ports import BadInput, NotThere, PortError, Refused


@contextmanager
def asking(what: str, uri: str, cache: Path) -> Iterator[None]:
    """Whatever goes wrong within says that one could not `what`, at which registry, and why."""
    import requests
    import urllib3
    from mlflow.exceptions import MlflowException

    try:
        yield
    except PortError:
        raise
    except MlflowException as exc:
        raise _of_mlflow(exc, what, uri, cache) from exc
    except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
        raise PortError(f"could not {what}: the registry at {uri} does not answer: {_short(exc)}") from exc
    except OSError as exc:
        raise _of_disk(exc, what, cache) from exc


def _of_mlflow(exc: Any, what: str, uri: str, cache: Path) -> PortError:
    text, code, whole = _short(exc), exc.error_code, str(exc)
    if "No space left on device" in whole or "[Errno 28]" in whole:
        return PortError(f"could not {what}: no space left, on the registry's disk or in {cache}: {text}")
    if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND") or "404 Client Error" in whole:
        return NotThere(f"could not {what}: {text}")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return Refused(f"could not {what}: the registry at {uri} does not allow it: {text}")
    if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
        return BadInput(f"could not {what}: {text}")
    if code == "ENDPOINT_NOT_FOUND":
        return PortError(f"could not {what}: {uri} answers, but not as an MLflow server: {text}")
    if "API request to" in whole:
        return PortError(f"could not {what}: the registry at {uri} does not answer: {text}")
    return PortError(f"could not {what}: the registry at {uri} failed: {text}")


def _of_disk(exc: OSError, what: str, cache: Path) -> PortError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return PortError(f"could not {what}: no space left in {cache}; free some, or keep the cache elsewhere")
    return PortError(f"could not {what}: {exc.strerror or exc}" + (f": {exc.filename}" if exc.filename else ""))


def _short(exc: BaseException) -> str:
    text = first_line(exc)
    for _ in range(2):  # "CODE: CODE: text", and the outer layers of urllib3's onion
        text = re.sub(r"^[A-Z_]+: ", "", text)
    reason = re.search(r"Caused by \w+\(.*?((?:Failed|Connection|timed out|Read|Max)[^\"')]*)", text)
    return (reason[1] if reason else text)[:400].rstrip(".")
