"""The command line. Exit codes: 0 done, 1 refused or rolled back, 2 wrong usage or policy, 3 could not finish."""

from __future__ import annotations

import errno
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.cli_approval import approve
from flows.cli_policy import plan, policy_app, read_policy
from flows.cli_record import audit_app, quarantine_app
from flows.settings import Settings, read_settings
from serving.log import complain
from tasks.ports import BadInput, NotThere, PortError

DONE, REFUSED, USAGE, UNFINISHED = 0, 1, 2, 3

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Continuous delivery for machine-learning models.\n\nStart with: lockgate demo",
    epilog="Exit codes: 0 done, 1 refused or rolled back, 2 wrong usage or policy, 3 could not finish.",
)
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")
app.add_typer(quarantine_app, name="quarantine")
app.command(epilog='Example: lockgate approve flight-delay --reason "seen by the desk" --ticket CHG-42')(approve)
app.command(epilog="Example: lockgate plan flights.yaml --rps 50")(plan)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name in the registry.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it goes on the record.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def _print(document: Any) -> None:
    out.print_json(json.dumps(document, default=str))


# ---------------------------------------------------------------- the platform


def _port(text: str) -> Any:
    return typer.Option(help=text, min=1, max=65535)


@app.command(epilog="Example: lockgate up --detach && lockgate status")
def up(
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background; `lockgate down` ends it.")] = False,
    prefect_port: Annotated[int | None, _port("Port of the Prefect server and UI.")] = None,
    mlflow_port: Annotated[int | None, _port("Port of the MLflow server and UI.")] = None,
    gateway_port: Annotated[int | None, _port("Port of the gateway, for predictions.")] = None,
    evidently_port: Annotated[int | None, _port("Start Evidently's UI, too, on this port.")] = None,
    trigger_port: Annotated[int | None, _port("Port of the trigger receiver; any by default.")] = None,
) -> None:
    """Start the local platform: Prefect, MLflow, node agent with gateway, worker, receiver, reconciler."""
    from flows import platform

    asked = {
        "prefect_port": prefect_port,
        "mlflow_port": mlflow_port,
        "gateway_port": gateway_port,
        "trigger_port": trigger_port,
        "evidently_port": evidently_port,
    }
    ports = {name: port for name, port in asked.items() if port}
    settings = Settings.model_validate({**read_settings().model_dump(), **ports})
    raise typer.Exit(platform.up(settings, detach, out, err))


@app.command()
def down() -> None:
    """Stop the local platform. The data stays."""
    from flows import platform

    raise typer.Exit(platform.down(read_settings(), out))


@app.command(epilog="Example: lockgate status --json")
def status(as_json: Json = False) -> None:
    """What runs, where it is, and how each model stands."""
    from flows.overview import overview

    seen = overview(read_settings())
    if as_json:
        _print(seen)
        return
    for part, url in seen["platform"].items():
        out.print(f"{part:<10} {url}", markup=False)
    columns = ("model", "champion", "asked_for", "traffic", "rollout", "state", "verdict")
    table = Table(*(name.replace("_", " ") for name in columns), box=None)
    for model in seen["models"]:
        table.add_row(*(str(model[key] or "-") for key in columns))
    out.print(table if seen["models"] else "no model has been delivered yet")
    for model in seen["models"]:
        out.print(f"{model['model']}: {'  '.join(model['links'].values())}", markup=False)


@app.command(epilog="Example: lockgate doctor --json")
def doctor(as_json: Json = False) -> None:
    """What is wrong with this set-up, and what to do. Exit 1 if anything is."""
    from flows.doctor import examined

    seen = []
    for each in examined():
        seen.append(each)
        if not as_json:
            out.print(f"{'ok   ' if each.ok else 'WRONG'} {each.what}: {each.says}", markup=False)
            if not each.ok:
                out.print(f"      -> {each.todo}", markup=False)
    if as_json:
        _print([asdict(each) if not each.ok else {**asdict(each), "todo": ""} for each in seen])
    raise typer.Exit(DONE if all(each.ok for each in seen) else REFUSED)


# ---------------------------------------------------------------- deliveries


@app.command(
    epilog="Examples: lockgate deliver flight-delay --file model.onnx --policy flights.yaml ·"
    " lockgate deliver flight-delay --version 7 --policy flights.yaml --json"
)
def deliver(
    model: Model,
    policy: Annotated[Path, typer.Option("--policy", "-p", help="The policy file, or the name of a ready-made one.")],
    file: Annotated[Path | None, typer.Option("--file", "-f", help="An .onnx file to register and deliver.")] = None,
    version: Annotated[int | None, typer.Option("--version", help="A version that is registered already.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="runs:/id/path or models:/name/version.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Validation rows (CSV, Parquet) with the label.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A sample of the training rows.")] = None,
    expected: Annotated[Path | None, typer.Option(help="Rows with the framework's own predictions.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="JSON file with the metrics of the training.")] = None,
    reason: Reason = "",
    rps: Annotated[float | None, typer.Option(help="Expected requests a second; refuses a plan that is blind.")] = None,
    as_json: Json = False,
) -> None:
    """Register, check, let traffic on step by step, promote or take back. Waits for the end."""
    from flows.run import run_delivery

    found = read_policy(policy)
    if rps is not None:
        from flows import planning

        problems = planning.planned(found.policy, planning.Traffic(rps)).problems
        if problems:
            raise BadInput("\n".join(problems))
    if sum(each is not None for each in (file, version, source)) != 1:
        raise BadInput("say what to deliver with exactly one of --file, --version and --source")
    request = {
        "model": model,
        "version": version,
        "source": str(file.resolve()) if file else source,
        "policy": str(found.path or policy),
        "files": {
            "validation": str(validation.resolve()) if validation else None,
            "reference": str(reference.resolve()) if reference else None,
            "expected": str(expected.resolve()) if expected else None,
            "metrics": _metrics(metrics),
        },
        "reason": reason,
    }
    code, outcome = run_delivery(read_settings(), request, None if as_json else out, err)
    if as_json and outcome is not None:
        _print(outcome)
    raise typer.Exit(code)


def _metrics(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise BadInput(f"metrics file {path} must be a JSON object of numbers: {exc}") from exc


@app.command(epilog='Example: lockgate rollback flight-delay --reason "complaints from the call centre"')
def rollback(model: Model, reason: Reason = "", as_json: Json = False) -> None:
    """Back to the former version: aborts a delivery under way, or brings the last proven version back."""
    from flows.run import run_rollback

    code, outcome = run_rollback(read_settings(), model, reason, None if as_json else out, err)
    if as_json and outcome is not None:
        _print(outcome)
    raise typer.Exit(code)


@app.command(epilog="Example: lockgate watch flight-delay")
def watch(model: Model, as_json: Json = False) -> None:
    """Follow the model's rollout until it ends (the last one, if none is under way)."""
    from flows.live import LiveView
    from flows.overview import newest
    from flows.story import state_of
    from flows.wiring import ledger

    book = ledger(read_settings())
    name = newest(book, model)
    if name is None:
        raise NotThere(f"the ledger has no rollout of model '{model}'")
    state_of(book, name)  # one that cannot be read is not followed
    if as_json:
        for entry in book.read(name):
            _print(asdict(entry))
        return
    with LiveView(out, book, lambda: name) as view:
        while view.followed is None or view.followed.state is None or not view.followed.state.ended:
            time.sleep(0.2)


def _order(model: str, what: str, reason: str, as_json: bool) -> None:
    from flows.run import give_order

    state = give_order(read_settings(), model, what, reason)
    _print({"model": model, "order": what, "state": state}) if as_json else out.print(
        f"{model}: {what} ordered; {state}"
    )


@app.command()
def pause(model: Model, reason: Reason = "", as_json: Json = False) -> None:
    """Hold the rollout at its stage. The gates go on looking, and roll back if they must."""
    _order(model, "pause", reason, as_json)


@app.command()
def resume(model: Model, reason: Reason = "", as_json: Json = False) -> None:
    """Let a paused rollout go on."""
    _order(model, "resume", reason, as_json)


@app.command()
def promote(model: Model, reason: Reason = "", as_json: Json = False) -> None:
    """Skip the remaining stages of the rollout, on your own word. It is still watched."""
    _order(model, "promote", reason, as_json)


@app.command()
def abort(model: Model, reason: Reason = "", as_json: Json = False) -> None:
    """Take the rollout back now."""
    _order(model, "abort", reason, as_json)


@app.command(epilog="Example: lockgate explain flight-delay")
def explain(
    name: Annotated[str, typer.Argument(metavar="ROLLOUT|MODEL", help="A rollout, or a model: its newest one.")],
    as_json: Json = False,
) -> None:
    """Why each decision fell, and what would have changed it. Reads the ledger alone; the platform may be down."""
    from flows.explain import explained, lines
    from flows.wiring import ledger

    found = explained(ledger(read_settings()), name)
    _print(found) if as_json else out.print("\n".join(lines(found)), markup=False)


@app.command(epilog="Example: lockgate labels flight-delay outcomes.csv")
def labels(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or Parquet: request_id, label (0 to 1), row.")],
    as_json: Json = False,
) -> None:
    """Take in the truth on earlier requests, by their request id, for the quality gate. The later label wins."""
    from flows.wiring import label_store

    count = label_store(read_settings()).add(model, file)
    _print({"model": model, "labels": count}) if as_json else out.print(f"{model}: {count:,} labels stored")


@app.command(epilog="Example: lockgate rehearse flight-delay --version 7 --policy flights.yaml")
def rehearse(
    model: Model,
    policy: Annotated[Path, typer.Option("--policy", "-p", help="The policy file, or the name of a ready-made one.")],
    version: Annotated[int | None, typer.Option(help="The candidate; by default the alias's.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="An .onnx file that is not registered.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Rows (CSV, Parquet) instead of what the servers sampled.")] = None,
    rps: Annotated[float, typer.Option(help="With --rows: how many come in a second.")] = 50.0,
    hours: Annotated[float, typer.Option(help="How far back the sampled traffic goes.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Play a rollout on recorded traffic: where would it have ended, and why? Changes nothing."""
    from flows.run import run_rehearsal

    asked = {
        "model": model,
        "version": version,
        "policy": str(read_policy(policy).path or policy),
        "file": str(file.resolve()) if file else None,
        "rows": str(rows.resolve()) if rows else None,
        "rps": rps,
        "hours": hours,
    }
    code, seen = run_rehearsal(read_settings(), asked, None if as_json else out, err)
    if as_json and seen is not None:
        _print(seen)
    raise typer.Exit(code)


@app.command(epilog="Example: lockgate monitor flight-delay --json")
def monitor(
    model: Model,
    policy: Annotated[
        Path | None, typer.Option("--policy", "-p", help="Another policy than the version was delivered by.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look now at what serves: drift, data, quality. Exit 1 where something is amiss, 3 where it could not be told."""
    from flows.run import run_monitor

    code, look = run_monitor(read_settings(), model, str(policy) if policy else None, None if as_json else out, err)
    if as_json and look is not None:
        _print(look)
    raise typer.Exit(code)


# ---------------------------------------------------------------- serving and the demo


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: lockgate serve model.onnx --port 8081",
)
def serve(context: typer.Context, path: Annotated[Path, typer.Argument(metavar="PATH", help="An .onnx file.")]) -> None:
    """One model server on a file, named after it, without gateway or registry. Options: serve PATH --help-server."""
    from serving.server import main as server

    extra = ["--help" if each == "--help-server" else each for each in context.args]
    named = any(each.split("=")[0] == "--model" for each in extra)
    name = () if named else ("--model", path.stem)
    raise typer.Exit(server(["--path", str(path), *name, *extra]) or 0)


@app.command(epilog="Example: lockgate demo --json demo.json")
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the outcome there.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the demo's data (kept); a fresh one by default.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=20, max=2000)] = 200.0,
) -> None:
    """A year of an airline's delay model: one good version is promoted, two bad ones are taken back, nobody notices."""
    from flows.demo import play

    raise typer.Exit(play(json_file, keep, rate, out, err))


def main() -> None:
    """The console script. Every foreseen error is one sentence, and the exit code that goes with it; one that was not
    foreseen is told below its traceback, and never looks like a refusal."""
    try:
        app()
    except PortError as exc:
        err.print(f"lockgate: {exc}", markup=False)
        sys.exit(USAGE if isinstance(exc, (BadInput, NotThere)) else UNFINISHED)
    except Exception as exc:  # noqa: BLE001 - Python would end with 1, as a refusal does
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            complain(
                f"lockgate: the disk is full ({exc.filename or 'no file named'}); nothing was changed by this command"
            )
        else:
            told = "".join(traceback.format_exception(exc))
            complain(
                f"{told}lockgate: not foreseen: {type(exc).__name__}: {exc}; please report it with the lines above"
            )
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
