"""`lockgate policy` and `lockgate plan`: what a policy says, and what it will do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.settings import read_settings
from tasks.ports import BadInput

if TYPE_CHECKING:
    from flows.policy import Found

policy_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check and explain policies.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
PolicyFile = Annotated[Path, typer.Argument(metavar="POLICY", help="The policy file, or the name of a ready-made one.")]
Rps = Annotated[float | None, typer.Option("--rps", help="Expected requests a second.")]
ErrorRate = Annotated[float, typer.Option(help="Share of requests that fail in the stable version.")]
SlowRate = Annotated[float, typer.Option(help="Share of its requests beyond the latency gate's SLO.")]
LabelLag = Annotated[float, typer.Option(help="Seconds after which an answer's label comes.")]

out = Console(highlight=False, soft_wrap=True)


def read_policy(wanted: Path) -> Found:
    """The policy in the file, or of that name. Raises BadInput where there is none, or it is not sound."""
    from flows.policy import find
    from policies.policy import PolicyError

    try:
        return find(read_settings().shelf, str(wanted))
    except PolicyError as exc:
        raise BadInput(str(exc)) from exc


def plan(
    policy: PolicyFile,
    rps: Rps = None,
    error_rate: ErrorRate = 0.001,
    slow_rate: SlowRate = 0.01,
    label_lag: LabelLag = 0.0,
    measured: Annotated[str | None, typer.Option(metavar="MODEL", help="Measure the traffic of this model.")] = None,
    as_json: Json = False,
) -> None:
    """How long each stage will take and what each gate will see. Exit 2 where one could not see what it guards."""
    from flows import planning

    parsed = read_policy(policy).policy
    if (rps is None) == (measured is None):
        raise BadInput("say the traffic with exactly one of --rps and --measured")
    if measured is not None:
        from flows.wiring import connect

        traffic = replace(planning.measure(connect(read_settings()), measured, parsed), label_lag_s=label_lag)
    else:
        traffic = planning.Traffic(rps or 0.0, error_rate, slow_rate, label_lag)
    made = planning.planned(parsed, traffic)
    if as_json:
        out.print_json(json.dumps(planning.document(made, traffic, parsed), default=str))
    else:
        out.print("\n".join(planning.lines(made, traffic, parsed)), markup=False)
    if made.problems:
        raise BadInput("\n".join(made.problems))


@policy_app.command(epilog="Example: lockgate policy check flights.yaml")
def check(policy: PolicyFile, as_json: Json = False) -> None:
    """Is the policy sound? Names the line and the nearest known key if not."""
    parsed = read_policy(policy).policy
    if as_json:
        out.print_json(json.dumps({"policy": parsed.name, "digest": parsed.digest, "ok": True}))
    else:
        out.print(f"{parsed.name}: sound (digest {parsed.digest[:12]})")


@policy_app.command("explain", epilog="Example: lockgate policy explain flights.yaml")
def explain_policy(policy: PolicyFile, as_json: Json = False) -> None:
    """What the policy will do, in sentences, defaults included."""
    from policies.words import explain as words

    parsed = read_policy(policy).policy
    if as_json:
        out.print_json(json.dumps(parsed.model_dump(mode="json", by_alias=True)))
    else:
        out.print("\n".join(words(parsed)), markup=False)


@policy_app.command()
def schema() -> None:
    """The JSON Schema of policy files, for editors."""
    from policies.policy import schema as made

    sys.stdout.write(json.dumps(made(), indent=2) + "\n")
