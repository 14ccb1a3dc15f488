"""What a delivery is asked to deliver, as it is written down with the rollout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from flows.policy import find, shelf_in
from policies import audit
from tasks.ports import BadInput, Submission


class Files(BaseModel):
    """What comes with the model. Files given for bytes that are registered already replace those kept with them."""

    validation: str | None = Field(None, description="Validation rows (CSV or Parquet), instead of the policy's.")
    reference: str | None = Field(None, description="A sample of the training rows.")
    expected: str | None = Field(None, description="Rows with the training framework's own predictions.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Metrics of the training.")


class Delivery(Files):
    """What to deliver, by which policy; written down with the rollout."""

    model: str = Field(description="Name of the registered model, e.g. flight-delay.")
    source: str = Field(description="An .onnx file, models:/name/version or runs:/id/path.")
    policy: str = Field(description="The policy's YAML text.")
    policy_folder: str = Field(".", description="Folder that the policy's relative paths start from.")
    target: str = Field("local", description="Where it shall run.")
    by: str = Field("", description="Who asked for it.")
    reason: str = Field("", description="Why.")


def requested(
    shelf: Path,
    model: str,
    version: int | None,
    policy: str | None,
    source: str | None,
    files: Files | None,
    **told: str,
) -> Delivery:
    """The delivery that is asked for, its policy looked up. Raises BadInput, PolicyError."""
    refuse_unfit({"source": source, "files": files.model_dump() if files else None, **told})
    if told.get("target", "local") != "local":
        raise BadInput(f"there is no target '{told['target']}'; the one that there is is 'local'")
    if version is not None and source is not None:
        raise BadInput("say what to deliver with `version` or `source`, not with both")
    found = find(shelf, policy) if policy else shelf_in(shelf).policy_for(model)
    if found is None:
        unsound = "".join(f"; {why}" for why in shelf_in(shelf).unsound.values())
        raise BadInput(f"no policy in {shelf} says `model: {model}`; name one, or put one there{unsound}")
    return Delivery(
        model=model,
        source=source or (f"models:/{model}@candidate" if version is None else f"models:/{model}/{version}"),
        policy=found.text,
        policy_folder=str(found.folder),
        **(files or Files()).model_dump(),
        **told,
    )


def refuse_unfit(asked: Mapping[str, Any]) -> None:
    """Raises BadInput where a text cannot be written down, before anything has come of it."""
    try:
        audit.refuse_unfit(asked)
    except audit.NotCanonical as exc:
        raise BadInput(str(exc)) from exc


def request_submission(request: Delivery) -> Submission:
    """The request's part that goes into the registry."""

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    return Submission(
        model=request.model,
        source=request.source,
        validation=path(request.validation),
        reference=path(request.reference),
        expected=path(request.expected),
        metrics=request.metrics,
    )
