"""`lockgate audit` and `lockgate quarantine`: the record, and what it forbids."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.output import output
from flows.settings import read_settings
from policies.audit import Head
from tasks.ports import BadInput

audit_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Verify, export and recompute the record.")
quarantine_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Bytes that failed and are not to serve again."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="A file with the secret that signs the head (HMAC-SHA-256)."),
]

out = Console(highlight=False, soft_wrap=True)


def _key(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        key = path.read_bytes().strip()
    except OSError as exc:
        raise BadInput(f"the key {path} cannot be read: {exc.strerror}") from exc
    if not key:
        raise BadInput(f"the key {path} is empty")
    return key


def _head(text: str) -> Head | None:
    try:
        return Head.parse(text) if text else None
    except ValueError as exc:
        raise BadInput(str(exc)) from exc


@audit_app.command(epilog="Example: lockgate audit verify ledger.jsonl --key secret.txt")
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="An export; the ledger itself by default.")
    ] = None,
    key: KeyFile = None,
    known: Annotated[
        str, typer.Option("--known", metavar="NUMBER:HASH", help="A head that was shown earlier: its end is not cut.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Does every entry follow from the one before it? Names the first that does not; exit code 1 then."""
    from flows.record import as_document, verified
    from flows.wiring import ledger

    if known and file is not None:
        raise BadInput("--known is for the ledger itself: an export says at its end which head it has")
    seen = verified(ledger(read_settings()), file, _key(key), _head(known))
    if as_json:
        out.print_json(json.dumps(as_document(seen)))
    elif seen.breach is None:
        signed = " its head is signed with this key" if seen.signed else ""
        out.print(f"sound: {seen.head.number} entries, head {seen.head}{signed}", markup=False)
    else:
        out.print(f"NOT sound: entry {seen.breach.number}: {seen.breach.why}", markup=False)
    raise typer.Exit(0 if seen.breach is None else 1)


@audit_app.command(epilog="Example: lockgate audit export ledger.jsonl --key secret.txt")
def export(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Standard output by default.")] = None,
    key: KeyFile = None,
) -> None:
    """The whole ledger as JSON Lines; the last line is its head, signed if a key is given."""
    from flows.record import exported
    from flows.wiring import ledger

    lines = exported(ledger(read_settings()), _key(key))
    if file is None:
        sys.stdout.buffer.writelines(lines)
        return
    with output(file) as sink:
        sink.writelines(lines)


@audit_app.command(epilog="Example: lockgate audit replay flight-delay-v2-1a2b3c4d")
def replay(
    rollout: Annotated[
        str, typer.Argument(metavar="ROLLOUT", help="The rollout's name, as `lockgate status` shows it.")
    ],
    as_json: Json = False,
) -> None:
    """Recomputes every decision from the recorded evidence and policy; exit code 1 if any differs."""
    from flows.record import replay as recomputed
    from flows.wiring import ledger

    entries = ledger(read_settings()).read(rollout)
    if not entries:
        raise BadInput(f"the ledger has no rollout '{rollout}'")
    looks, differences = recomputed(entries)
    if as_json:
        out.print_json(json.dumps({"looks": looks, "differences": [asdict(each) for each in differences]}))
    else:
        out.print(f"{looks} decisions recomputed, {len(differences)} differ", markup=False)
        for each in differences:
            out.print(f"  entry {each.number}: written {each.written}; recomputed {each.recomputed}", markup=False)
    raise typer.Exit(1 if differences else 0)


@quarantine_app.command("list")
def listed(as_json: Json = False) -> None:
    """The digests in quarantine, since when, and why."""
    from flows.wiring import ledger

    held = ledger(read_settings()).quarantines()
    if as_json:
        out.print_json(json.dumps([asdict(each) for each in held]))
        return
    for each in held:
        out.print(f"{each.digest}  {each.rollout}  {each.reason}", markup=False)
    if not held:
        out.print("nothing is in quarantine")


@quarantine_app.command(epilog='Example: lockgate quarantine lift 3f9a… --reason "the outage was ours, see INC-12"')
def lift(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The digest, or a beginning of it that is unique.")],
    reason: Annotated[str, typer.Option("--reason", help="Why these bytes may serve again; it goes on the record.")],
) -> None:
    """Lets bytes in quarantine be delivered again. Who said so, and why, stays on the record."""
    from flows.wiring import ledger

    if not digest:
        raise BadInput("name the digest, or a beginning of it; see: lockgate quarantine list")
    book = ledger(read_settings())
    found = [each.digest for each in book.quarantines() if each.digest.startswith(digest)]
    if len(found) != 1:
        raise BadInput(f"'{digest}' names {len(found)} digests in quarantine; see: lockgate quarantine list")
    book.lift(found[0], reason, read_settings().person)
    out.print(f"{found[0]} may be delivered again", markup=False)
