"""Rows of a CSV or Parquet file, as a model's inputs, a label, or any column.

How columns become inputs: an input named as a column takes that column; an input `f` of shape [N, k] takes the columns
`f.0` .. `f.k-1`, or else the file's numeric columns in their order, without the label and `prediction`.
Columns that nothing asks for are left alone. NumPy and pyarrow are imported when first used.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.ports import BadInput, PortError, Signature, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREDICTION = "prediction"
SUFFIXES = (".csv", ".parquet")
# Open Inference Protocol datatype -> NumPy's name for it. BYTES are strings here.
NUMPY_OF: Mapping[str, str] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}


def read(path: Path, limit: int | None = None, text: Collection[str] = ()) -> Any:
    """The file as a pyarrow Table, at most `limit` rows. CSV columns named in `text` stay text, even if all digits.

    Raises BadInput for a file that is not there, has another suffix, is broken, or has no row; PortError where the
    system could not read it now.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path}: rows are read from {' or '.join(SUFFIXES)} files, not '{path.suffix}'")
    import pyarrow as pa

    try:
        table = _parquet(path, limit) if path.suffix.lower() == ".parquet" else _csv(path, text)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        trouble = isinstance(exc, OSError) and exc.errno is not None and not isinstance(exc, PermissionError)
        kind = PortError if trouble else BadInput  # the machine's trouble passes, what is wrong with the file does not
        raise kind(f"{path}: not readable as {path.suffix[1:].upper()}: {first_line(exc)}") from exc
    if table.num_rows == 0:
        raise BadInput(f"{path}: has no rows")
    return table if limit is None else table.slice(0, limit)


def _parquet(path: Path, limit: int | None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if limit is None:
            return file.read()
        batches, rows = [], 0
        for batch in file.iter_batches(batch_size=max(1, min(limit, 65536))):
            batches.append(batch)
            rows += batch.num_rows
            if rows >= limit:
                break
        return pa.Table.from_batches(batches, schema=file.schema_arrow)


def _csv(path: Path, text: Collection[str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    # An empty cell is missing in a numeric column and the empty string in a column of text, as pandas has it.
    options = csv.ConvertOptions(column_types={name: pa.string() for name in text}, strings_can_be_null=False)
    return csv.read_csv(path, convert_options=options)


def first_line(exc: BaseException) -> str:
    """The first line of the exception's text, or its type's name where it has none."""
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


def values(table: Any, name: str, path: Path, what: str = "column") -> Any:
    """The column. Raises BadInput where the file has none or several of that name, and names the nearest one."""
    if table.column_names.count(name) > 1:
        raise BadInput(f"{path}: has more than one {what} '{name}'; keep the one that is meant")
    if name in table.column_names:
        return table.column(name)
    near = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(table.column_names[:20])}"
    raise BadInput(f"{path}: has no {what} '{name}'; {hint}")


def numbers(table: Any, name: str, path: Path, what: str = "column") -> NDArray[np.float64]:
    """The column as float64, missing values as NaN. Raises BadInput if it is not there or not numeric."""
    import pyarrow as pa

    column = values(table, name, path, what)
    try:
        # From bool there is no direct cast to double; int8 lies between.
        column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
        found: NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy()
    except (pa.ArrowException, ValueError) as exc:
        raise BadInput(f"{path}: {what} '{name}' is not numeric: {first_line(exc)}") from exc
    return found


def label(table: Any, name: str, path: Path) -> NDArray[np.float64]:
    """The truth of each row, finite. Raises BadInput that names the file, the label and the nearest column."""
    import numpy as np

    found = numbers(table, name, path, "label")
    missing = int(np.count_nonzero(~np.isfinite(found)))
    if missing:
        raise BadInput(f"{path}: label '{name}' is missing or not finite in {missing} of {len(found)} rows")
    return found


def groups(table: Any, name: str, path: Path) -> NDArray[np.object_]:
    """The column's value per row as text, for slices; `(missing)` where there is none."""
    import numpy as np
    import pyarrow as pa

    column = values(table, name, path, "slice column")
    found = column.cast(pa.string()).fill_null("(missing)").to_pylist()
    return np.array([value or "(missing)" for value in found], dtype=object)


def text_inputs(signature: Signature) -> frozenset[str]:
    """The inputs that take strings: their columns must not be read as numbers."""
    return frozenset(tensor.name for tensor in signature.inputs if tensor.dtype == "BYTES")


def feeds(table: Any, signature: Signature, path: Path, label: str | None = None) -> dict[str, NDArray[Any]]:
    """Per input of the model an array whose first axis is the row. Raises BadInput naming what does not fit."""
    taken = {tensor.name for tensor in signature.inputs} | {PREDICTION}
    rest = [name for name in table.column_names if name not in taken and name != label]
    return {tensor.name: _input(table, tensor, rest, path) for tensor in signature.inputs}


def input_columns(
    table: Any, signature: Signature, path: Path, label: str | None = None
) -> dict[str, tuple[str, NDArray[Any]]]:
    """The inputs column by column: under the name that sampled rows have it by (`in.x`, `in.x.0`), the name that the
    file has it by, and its values as the model gets them. Raises BadInput naming what does not fit."""
    found: dict[str, tuple[str, NDArray[Any]]] = {}
    taken = {tensor.name for tensor in signature.inputs} | {PREDICTION}
    rest = [name for name in table.column_names if name not in taken and name != label]
    for tensor in signature.inputs:
        values = _input(table, tensor, rest, path)
        if len(tensor.shape) < 2:
            found[f"in.{tensor.name}"] = (tensor.name, values)
            continue
        flat = values.reshape(len(values), -1)
        named = tensor.name in table.column_names and flat.shape[1] == 1
        names = [tensor.name] if named else _matrix_columns(table, tensor, flat.shape[1], rest, path)
        for at, name in enumerate(names):
            found[f"in.{tensor.name}.{at}"] = (name, flat[:, at])
    return found


def _input(table: Any, tensor: Tensor, rest: Sequence[str], path: Path) -> NDArray[Any]:
    import numpy as np

    width = int(np.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else 1
    if tensor.name in table.column_names and width in (1, -1):
        flat = _typed(table, tensor.name, tensor, path)
        return flat.reshape(len(flat), *([1] * (len(tensor.shape) - 1)))
    if len(tensor.shape) != 2 or tensor.dtype == "BYTES":
        values(table, tensor.name, path, "column for the model's input")  # raises, with the nearest column
        raise BadInput(f"{path}: the input '{tensor.name}' of shape {list(tensor.shape)} cannot be read from a column")
    names = _matrix_columns(table, tensor, width, rest, path)
    return np.stack([_typed(table, name, tensor, path) for name in names], axis=1)


def _matrix_columns(table: Any, tensor: Tensor, width: int, rest: Sequence[str], path: Path) -> list[str]:
    numbered = [f"{tensor.name}.{i}" for i in range(width)] if width > 0 else []
    if numbered and all(name in table.column_names for name in numbered):
        return numbered
    if width == 1:
        values(table, tensor.name, path, "column for the model's input")
    import pyarrow as pa

    numeric = [
        name
        for name in rest
        if pa.types.is_floating(kind := table.schema.field(name).type)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
    ]
    if not numeric or width not in (-1, len(numeric)):
        raise BadInput(
            f"{path}: the model's input '{tensor.name}' takes {width} columns, and the file has {len(numeric)} numeric "
            f"ones beside label and prediction; name them {tensor.name}.0 .. {tensor.name}.{width - 1}"
        )
    return numeric


def _typed(table: Any, name: str, tensor: Tensor, path: Path) -> NDArray[Any]:
    """The column in the input's dtype. A missing number is NaN where the dtype has one, else BadInput."""
    import numpy as np
    import pyarrow as pa

    if tensor.dtype == "BYTES":
        return np.array(values(table, name, path).cast(pa.string()).fill_null("").to_pylist(), dtype=object)
    wanted = NUMPY_OF.get(tensor.dtype)
    if wanted is None:
        raise BadInput(
            f"the model's input '{tensor.name}' has the type {tensor.dtype}; rows can be read as {', '.join(NUMPY_OF)}"
        )
    if wanted.startswith("float"):
        return numbers(table, name, path).astype(wanted)
    column = values(table, name, path)
    if column.null_count:
        raise BadInput(
            f"{path}: column '{name}' is missing in {column.null_count} rows, and the model takes {tensor.dtype}"
        )
    try:
        if wanted == "bool":
            return np.asarray(column.cast(pa.bool_()).to_numpy(), dtype=bool)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        return np.asarray(column.cast(getattr(pa, wanted)()).to_numpy(), dtype=wanted)
    except pa.ArrowException as exc:
        raise BadInput(f"{path}: column '{name}' does not fit {tensor.dtype}: {first_line(exc)}") from exc
