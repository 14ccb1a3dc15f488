"""Rows: every column lands in the input it belongs to, or a sentence says which does not fit."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import rows
from tasks.ports import BadInput, PortError, Signature, Tensor


def signature(*inputs: Tensor) -> Signature:
    return Signature(inputs=inputs, outputs=(Tensor("p", "FP32", (-1, 1)),))


@pytest.fixture
def flights(tmp_path: Path) -> Path:
    path = tmp_path / "flights.csv"
    path.write_text("origin,distance,day,late\n007,1.5,1,true\n,,2,false\n9E,3,3,true\n")
    return path


def test_columns_become_the_inputs_that_bear_their_names_in_the_models_types(flights: Path) -> None:
    takes = signature(
        Tensor("distance", "FP32", (-1, 1)), Tensor("day", "INT64", (-1,)), Tensor("origin", "BYTES", (-1, 1))
    )
    table = rows.read(flights, text=rows.text_inputs(takes))
    feeds = rows.feeds(table, takes, flights)
    assert feeds["origin"].tolist() == [["007"], [""], ["9E"]]
    assert feeds["day"].tolist() == [1, 2, 3]
    assert feeds["distance"].dtype == np.float32
    np.testing.assert_array_equal(feeds["distance"], [[1.5], [np.nan], [3.0]])


def test_a_matrix_takes_numbered_columns_or_else_the_numeric_ones_in_the_files_order(tmp_path: Path) -> None:
    table = pa.table({"y": [1.0], "prediction": [0.5], "b": [2], "note": ["n"], "a": [1]})
    takes = signature(Tensor("f", "FP32", (-1, 2)))
    assert rows.feeds(table, takes, tmp_path, label="y")["f"].tolist() == [[2.0, 1.0]]
    numbered = table.append_column("f.1", [[8.0]]).append_column("f.0", [[7.0]])
    assert rows.feeds(numbered, takes, tmp_path, label="y")["f"].tolist() == [[7.0, 8.0]]
    with pytest.raises(BadInput, match=r"'f' takes 2 columns, and the file has 3 numeric"):
        rows.feeds(table, takes, tmp_path)  # without the label named, it counts as one


def test_a_limit_takes_the_first_rows_of_either_format(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(10))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    (tmp_path / "a.csv").write_text("a\n" + "\n".join(map(str, range(10))))
    for name in ("a.parquet", "a.csv"):
        assert rows.read(tmp_path / name, limit=4).column("a").to_pylist() == [0, 1, 2, 3]
        assert rows.read(tmp_path / name).num_rows == 10


def test_a_file_without_the_label_is_named_with_the_nearest_column(flights: Path) -> None:
    table = rows.read(flights)
    assert rows.label(table, "late", flights).tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(BadInput, match=r"flights\.csv: has no label 'lates'; did you mean 'late'\?"):
        rows.label(table, "lates", flights)
    with pytest.raises(BadInput, match="label 'distance' is missing or not finite in 1 of 3 rows"):
        rows.label(table, "distance", flights)
    with pytest.raises(BadInput, match="label 'origin' is not numeric"):
        rows.label(table, "origin", flights)


def test_slices_are_text_and_a_missing_value_is_a_slice_of_its_own(flights: Path) -> None:
    assert rows.groups(rows.read(flights), "origin", flights).tolist() == ["007", "(missing)", "9E"]
    assert rows.groups(rows.read(flights), "day", flights).tolist() == ["1", "2", "3"]


def test_what_does_not_fit_the_model_is_named(flights: Path) -> None:
    table = rows.read(flights)
    for tensor, says in (
        (Tensor("distanze", "FP32", (-1, 1)), "no column for the model's input 'distanze'; did you mean 'distance'"),
        (Tensor("distance", "INT64", (-1, 1)), "'distance' is missing in 1 rows, and the model takes INT64"),
        (Tensor("origin", "FP32", (-1, 1)), "'origin' is not numeric"),
        (Tensor("day", "BF16", (-1, 1)), "has the type BF16"),
    ):
        with pytest.raises(BadInput, match=says):
            rows.feeds(table, signature(tensor), flights)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name, content, says in (
        ("a.txt", b"x", r"\.csv or \.parquet"),
        ("a.parquet", b"no parquet", "not readable as PARQUET"),
        ("empty.csv", b"", "not readable as CSV"),
        ("head.csv", b"a,b\n", "has no rows"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=says):
            rows.read(tmp_path / name)
    with pytest.raises(BadInput, match="no such file"):
        rows.read(tmp_path / "gone.csv")


def test_a_column_that_is_there_twice_is_told_where_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "twice.csv"
    file.write_text("a,a,b\n1,1,2\n")
    table = rows.read(file)
    assert rows.numbers(table, "b", file).tolist() == [2.0]
    for dtype in ("FP32", "INT64", "BYTES"):
        with pytest.raises(BadInput, match=r"twice\.csv: has more than one column 'a'"):
            rows.feeds(table, signature(Tensor("a", dtype, (-1, 1))), file)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), PortError),
        (OSError(errno.EMFILE, "Too many open files"), PortError),
        (PermissionError(errno.EACCES, "Permission denied"), BadInput),
        (OSError("Unexpected end of stream"), BadInput),
    ],
)
def test_what_passes_by_itself_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[PortError]
) -> None:
    """Bad input refuses a version for good; what the system could not read now is tried again."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(rows, "_parquet", fail)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(PortError, match=r"a\.parquet: not readable as PARQUET") as raised:
        rows.read(tmp_path / "a.parquet")
    assert raised.type is kind


def test_a_parquet_file_whose_pages_are_broken_is_told(tmp_path: Path) -> None:
    file = tmp_path / "broken.parquet"
    pq.write_table(pa.table({"a": np.arange(1000.0)}), file, use_dictionary=False, write_statistics=False)
    body = bytearray(file.read_bytes())
    body[100:2000] = b"\xff" * 1900
    file.write_bytes(body)
    with pytest.raises(BadInput, match=r"broken\.parquet: not readable as PARQUET"):
        rows.read(file)
