"""Where policies are found: a file, one of the platform's own (its `policies` folder), or a ready-made one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from policies import policy
from policies.policy import Policy, PolicyError
from policies.policy_yaml import parse
from tasks.ports import BadInput

LIBRARY = Path(policy.__file__).parent / "library"


@dataclass(frozen=True)
class Found:
    """A policy, its text, and the folder that its relative paths start from."""

    policy: Policy
    text: str
    folder: Path
    path: Path | None = None


def find(shelf: Path, wanted: str) -> Found:
    """The policy: a file's path, a name in `shelf` or in the library, or the YAML text itself (with a line's end).

    Raises BadInput if there is none, PolicyError if it is not sound.
    """
    if "\n" in wanted:
        return Found(parse(wanted), wanted, shelf)
    named = (Path(wanted).expanduser(), shelf / f"{wanted}.yaml", LIBRARY / f"{wanted}.yaml")
    return read(next((path for path in named if path.is_file()), named[0]), wanted, shelf)


def for_model(policy: Policy, model: str) -> Policy:
    """The policy. Raises BadInput for one that says that it is for another model."""
    if policy.model not in (None, model):
        raise BadInput(f"policy '{policy.name}' is for model '{policy.model}', not '{model}'")
    return policy


def read(path: Path, wanted: str, shelf: Path) -> Found:
    """The policy in the file. Raises as `find` does."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise BadInput(f"policy {wanted} cannot be read ({exc}); known by name: {', '.join(known(shelf))}") from exc
    path = path.absolute()
    return Found(parse(text, str(path)), text, path.parent, path)


def known(shelf: Path) -> list[str]:
    """The names that `find` knows: the platform's own and the ready-made ones."""
    return sorted({file.stem for folder in (shelf, LIBRARY) for file in _files(folder)})


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.glob("*.yaml") if not file.stem.endswith("expectations"))
    except OSError as exc:
        raise BadInput(f"the policies in {folder} cannot be looked at: {exc.strerror or exc}") from exc


@dataclass(frozen=True)
class Shelf:
    """The platform's own policies, as they stood when it was read; `unsound` says what is wrong with which file."""

    folder: Path
    sound: tuple[Found, ...]
    unsound: dict[str, str]

    def policy_for(self, model: str) -> Found | None:
        """The one policy that says `model: MODEL`; None without any. Raises BadInput where two do."""
        found = [each for each in self.sound if each.policy.model == model]
        if len(found) > 1:
            names = ", ".join(each.path.name for each in found if each.path)
            raise BadInput(f"{names} in {self.folder} are all for model '{model}'; leave one, or name it")
        return found[0] if found else None


def shelf_in(folder: Path) -> Shelf:
    """The policies in the folder; none where there is no folder. Raises BadInput for one that is closed."""
    sound: list[Found] = []
    unsound: dict[str, str] = {}
    for path in _files(folder):
        try:
            sound.append(read(path, path.name, folder))
        except (PolicyError, BadInput) as exc:
            unsound[path.name] = str(exc)
    return Shelf(folder, tuple(sound), unsound)
