"""The README tells the truth: its commands exist, its policies parse, its files are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from flows.cli import app
from flows.settings import Settings
from policies.policy import schema
from policies.policy_yaml import parse
from policies.transitions import NAMES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def commands() -> set[str]:
    group = typer.main.get_command(app)
    found = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {each}" for each in inner} if inner else {name}
    return found


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"lockgate ((?:(?:policy|audit|quarantine) )?[a-z]+)", README))
    named -= {"takes", "policy"}
    assert named
    assert named <= commands() | {"holds"}, named - commands()


def test_the_readme_names_every_command_and_every_key_of_a_policy() -> None:
    assert not [name for name in commands() if f"lockgate {name}" not in README and f"`{name}`" not in README]
    named = set(re.findall(r"\w+", README))
    assert not sorted(keys(schema()) - named)


def keys(node: Any) -> set[str]:
    """All property names of a JSON Schema."""
    if isinstance(node, list):
        return set().union(*map(keys, node))
    if not isinstance(node, dict):
        return set()
    mine = set(node["properties"]) if isinstance(node.get("properties"), dict) else set()
    return mine.union(*map(keys, node.values()))


def test_every_command_has_help_that_says_what_it_does() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help, name


def test_the_readme_s_policies_are_sound() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        lines = [line.removeprefix("   ") for line in block.splitlines()]
        parse("\n".join(lines), "README")


def test_every_event_is_in_the_readme() -> None:
    assert not [name for name in NAMES if f"`{name}`" not in README]


def test_every_setting_is_in_the_readme_and_every_file_that_it_names_is_there() -> None:
    for name in Settings.model_fields:
        assert f"`{name}`" in README, name
    for path in re.findall(r"`((?:policies|tests|tasks|flows|serving|infra)/[\w/.-]+)`", README):
        assert (ROOT / path).exists(), path
