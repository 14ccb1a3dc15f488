"""DataContract: checks rows against a Great Expectations suite, a YAML or JSON file in its own form.

    name: flights
    expectations:
      - type: expect_column_values_to_not_be_null
        kwargs: {column: distance, mostly: 0.99}

Great Expectations takes 5 to 8 s to import and keeps its state in module globals, so each check runs in a process
of its own (`python -m infra.contract_great_expectations SUITE ROWS`), which prints one line of JSON. It sends nothing
home.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infra import rows as rows_file
from tasks.ports import BadInput, ContractBreach, ContractResult, PortError

_ANSWER = "lockgate-contract: "  # what else the worker prints is not the answer
_KEYS = frozenset({"type", "kwargs", "meta", "id", "severity", "description", "notes", "rendered_content"})
_EXAMPLES_MAX = 5
_PLACE = "lockgate.place"


class GreatExpectationsContract:
    """`tasks.ports.DataContract`. A check that takes longer than `timeout_s` is ended and raises PortError."""

    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s

    def check(self, suite: Path, rows: Path) -> ContractResult:
        """Raises BadInput for a suite or rows that cannot be read, naming the place."""
        _load(suite)  # a mistake in the file is told at once, without the import
        if not rows.is_file():
            raise BadInput(f"{rows}: no such file")
        environment = {**os.environ, "GX_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "infra.contract_great_expectations", str(suite.resolve()), str(rows.resolve())]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self._timeout_s, env=environment, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise PortError(
                f"the data contract {suite.name} was not checked on {rows.name} within {self._timeout_s:g} s"
            ) from exc
        answer = next((line for line in done.stdout.splitlines() if line.startswith(_ANSWER)), None)
        if answer is None:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise PortError(f"the check of {suite.name} ended with code {done.returncode} and no answer: {last}")
        return _result(json.loads(answer.removeprefix(_ANSWER)))


def _result(answer: Mapping[str, Any]) -> ContractResult:
    if "bad_input" in answer:
        raise BadInput(answer["bad_input"])
    breaches = tuple(ContractBreach(**breach) for breach in answer["breaches"])
    return ContractResult(rows=answer["rows"], evaluated=answer["evaluated"], breaches=breaches)


def _load(path: Path) -> list[dict[str, Any]]:
    """The suite's expectations as written. JSON is YAML, so one reader does for both."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise BadInput(f"{path}: no such suite") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise BadInput(f"{path}: the suite cannot be read: {exc}") from exc
    except yaml.YAMLError as exc:
        raise BadInput(f"{path}: neither YAML nor JSON: {' '.join(str(exc).split())}") from exc
    found = data.get("expectations") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise BadInput(f"{path}: a suite is a mapping with a list under 'expectations'")
    if not found:
        raise BadInput(f"{path}: the suite expects nothing, so it would pass any rows; write at least one expectation")
    for number, entry in enumerate(found, 1):
        _shape(path, number, entry)
    return found


def _shape(path: Path, number: int, entry: object) -> None:
    place = f"{path}, expectation {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise BadInput(f"{place}: is written as `type:` and `kwargs:`, not {entry!r:.80}")
    for key in entry.keys() - _KEYS:
        near = difflib.get_close_matches(str(key), _KEYS, n=1)
        raise BadInput(f"{place}: unknown key '{key}'; " + (f"did you mean '{near[0]}'?" if near else "use kwargs"))
    if not isinstance(entry.get("kwargs", {}), dict):
        raise BadInput(f"{place} ({entry['type']}): kwargs is a mapping, not {entry['kwargs']!r:.80}")


def _configurations(path: Path) -> list[Any]:
    """The suite as Great Expectations' own objects. Raises BadInput naming the expectation that it does not accept."""
    from great_expectations.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    made = []
    for number, entry in enumerate(_load(path), 1):
        place = f"{path}, expectation {number}"
        known = list_registered_expectation_implementations()
        if entry["type"] not in known:
            near = difflib.get_close_matches(entry["type"], known, n=1, cutoff=0.5)
            mend = f"; did you mean '{near[0]}'?" if near else ""
            raise BadInput(f"{place}: Great Expectations knows no '{entry['type']}'{mend}")
        try:
            # The outcomes come in an order of their own; the number in the meta puts them back.
            meta = {**(entry.get("meta") or {}), _PLACE: number}
            configuration = ExpectationConfiguration(**{"kwargs": {}, **entry, "meta": meta})
            configuration.to_domain_obj()  # says no to what it does not know; pydantic's errors are ValueErrors
            made.append(configuration)
        except (GreatExpectationsError, ValueError, TypeError) as exc:
            raise BadInput(f"{place} ({entry['type']}): {_reasons(exc)}") from exc
    return made


def _reasons(exc: Exception) -> str:
    if not hasattr(exc, "errors"):
        return rows_file.first_line(exc)
    seen: dict[str, str] = {}
    for error in exc.errors():
        seen.setdefault(".".join(str(part) for part in error["loc"]), error["msg"])
    return "; ".join(f"'{where}': {text}" for where, text in seen.items())


def evaluate(suite: Path, rows: Path) -> ContractResult:
    """The check itself, in this process. Imports Great Expectations and pandas."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    configurations = _configurations(suite)
    frame = rows_file.read(rows).to_pandas()
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset(rows.name)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    asked = gx.ExpectationSuite(name=suite.name)
    for configuration in configurations:
        asked.add_expectation_configuration(configuration)
    outcomes = sorted(batch.validate(asked).results, key=lambda outcome: int(outcome.expectation_config.meta[_PLACE]))
    if len(outcomes) != len(configurations):
        raise BadInput(f"{suite}: {len(configurations)} expectations, {len(outcomes)} outcomes; is one there twice?")
    columns = list(frame.columns)
    breaches = tuple(_breach(outcome, columns) for outcome in outcomes if not outcome.success)
    return ContractResult(rows=len(frame), evaluated=len(outcomes), breaches=breaches)


def _breach(outcome: Any, columns: list[str]) -> ContractBreach:
    kwargs = outcome.expectation_config.kwargs
    column = kwargs.get("column") or next((str(kwargs[k]) for k in ("column_A", "column_list") if k in kwargs), None)
    return ContractBreach(outcome.expectation_config.type, column, _seen(outcome, column, columns))


def _seen(outcome: Any, column: str | None, columns: list[str]) -> str:
    if isinstance(column, str) and column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        return f"no column '{column}' in the rows" + (f"; the nearest is '{near[0]}'" if near else "")
    error = _exception(outcome.exception_info)
    if error:
        return f"could not be evaluated: {error}"
    result = dict(outcome.result)
    if result.get("unexpected_count"):
        examples = list(dict.fromkeys(str(v) for v in result.get("partial_unexpected_list", ())))[:_EXAMPLES_MAX]
        share = 100 * result["unexpected_count"] / max(1, result["element_count"])
        shown = f", such as {', '.join(examples)}" if examples else ""
        return f"{result['unexpected_count']} of {result['element_count']} rows ({share:.3g} %){shown}"
    if result.get("observed_value") is not None:
        return str(result["observed_value"])
    return "not met"


def _exception(info: Any) -> str | None:
    """The message of the exception, which Great Expectations keeps flat or per metric."""
    if not isinstance(info, dict):
        return None
    if info.get("raised_exception"):
        return " ".join(str(info.get("exception_message")).split())
    nested = (_exception(entry) for entry in info.values() if isinstance(entry, dict))
    return next((text for text in nested if text), None)


def main(arguments: list[str]) -> int:
    """The worker: one line of JSON on standard output, whatever the outcome."""
    suite, rows = (Path(argument) for argument in arguments)
    try:
        result = evaluate(suite, rows)
    except BadInput as exc:
        answer: dict[str, Any] = {"bad_input": str(exc)}
    else:
        breaches = [{"expectation": b.expectation, "column": b.column, "seen": b.seen} for b in result.breaches]
        answer = {"rows": result.rows, "evaluated": result.evaluated, "breaches": breaches}
    sys.stdout.write(f"\n{_ANSWER}{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
