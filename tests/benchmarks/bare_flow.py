"""A Prefect flow that does nothing: what any flow costs to come to its first line."""

from __future__ import annotations

from prefect import flow


@flow(name="bare")
def bare() -> None:
    """Nothing."""
