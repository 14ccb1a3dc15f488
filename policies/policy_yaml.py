"""A policy read from YAML. What cannot be used is a `PolicyError`, which names the line and the nearest known key."""

from __future__ import annotations

import difflib
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from policies.policy import NEW, Policy, PolicyError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing a key given twice (it would silently keep the last), and saying where a value
    stands that looks like a time or a number and is none."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise PolicyError(f"line {key.start_mark.line + 1}: a key is a word, not a list or a mapping")
            if key.value in seen:
                raise PolicyError(f"line {key.start_mark.line + 1}: '{key.value}' is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except PolicyError:
            raise
        except ValueError as exc:
            raise PolicyError(f"line {node.start_mark.line + 1}: '{node.value}' cannot be read: {exc}") from exc


def parse(text: str, source: str = "policy") -> Policy:
    """The policy written in YAML `text`. Raises `PolicyError` naming `source`, line, offending value and remedy."""
    try:
        tree = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader that refuses even more
    except yaml.YAMLError as exc:
        raise PolicyError(f"{source}: not YAML: {' '.join(str(exc).split())}") from exc
    except RecursionError as exc:
        raise PolicyError(f"{source}: nested too deeply for a policy") from exc
    except PolicyError as exc:
        raise PolicyError(f"{source}, {exc}") from exc
    if not isinstance(data, dict):
        raise PolicyError(f"{source}: a policy is a mapping of keys, not {type(data).__name__}")
    try:
        return Policy.model_validate(data, context=NEW)
    except ValidationError as exc:
        raise PolicyError("\n".join(f"{source}, {_sentence(error, tree)}" for error in exc.errors())) from exc


def _sentence(error: Any, tree: yaml.Node | None) -> str:
    """One pydantic error as `line N: key: what is wrong (what would mend it)`."""
    path = [str(part) for part in error["loc"]]
    line = _line(tree, path)
    where = ".".join(path) or "policy"
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        mend = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"line {line}: unknown key '{where}'; {mend}"
    if error["type"] == "missing":
        return f"line {line}: '{where}' is missing"
    text = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = f" (it is {value!r})" if isinstance(value, (str, int, float, bool)) and str(value) not in text else ""
    return f"line {line}: '{where}': {text}{shown}"


def _line(tree: yaml.Node | None, path: list[str]) -> int:
    """The line of the deepest node along `path` that is in the document (1-based)."""
    node, line = tree, 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
    return line


def _known_keys(path: list[str]) -> list[str]:
    """The keys that the schema knows at `path`."""
    model: type[BaseModel] = Policy
    for part in path:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is None:
            continue  # an index into a list
        inner = _model_within(field.annotation)
        if inner is None:
            break
        model = inner
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _model_within(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_within(arg))), None)
