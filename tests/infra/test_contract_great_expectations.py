"""The data contract: what does not meet it is named; a suite that cannot be used is refused, not passed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.contract_great_expectations import GreatExpectationsContract
from tasks.ports import BadInput, PortError

ROWS = "distance,origin\n100,EWR\n200,JFK\n300,LGA\n,EWR\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


def suite(tmp_path: Path, *expectations: object) -> Path:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"name": "s", "expectations": list(expectations)}))
    return path


@pytest.mark.e2e
def test_every_breach_names_expectation_column_and_what_was_seen_in_the_suites_order(
    tmp_path: Path, rows: Path
) -> None:
    contract = suite(
        tmp_path,
        {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "distance", "mostly": 0.9}},
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "origin", "value_set": ["EWR", "JFK"]}},
        {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "distance", "max_value": 150}},
        {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "distanze", "max_value": 150}},
        {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1}},
    )
    result = GreatExpectationsContract().check(contract, rows)
    assert (result.rows, result.evaluated) == (4, 5)
    seen = [(b.expectation, b.column, b.seen) for b in result.breaches]
    assert seen == [
        ("expect_column_values_to_not_be_null", "distance", "1 of 4 rows (25 %), such as nan"),
        ("expect_column_values_to_be_in_set", "origin", "1 of 4 rows (25 %), such as LGA"),
        ("expect_column_mean_to_be_between", "distance", "200.0"),
        ("expect_column_mean_to_be_between", "distanze", "no column 'distanze' in the rows; the nearest is 'distance'"),
    ]


@pytest.mark.e2e
def test_a_suite_in_yaml_that_is_met_has_no_breach(tmp_path: Path, rows: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "expectations:\n  - {type: expect_column_to_exist, kwargs: {column: origin}, meta: {why: slices}}\n"
    )
    result = GreatExpectationsContract().check(path, rows)
    assert (result.evaluated, result.breaches) == (1, ())


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("expectation", "says"),
    [
        ({"type": "expect_column_to_exsit", "kwargs": {}}, "did you mean 'expect_column_to_exist'"),
        ({"type": "expect_column_to_exist", "kwargs": {}}, r"\(expect_column_to_exist\): 'column': field required"),
        ({"type": "expect_column_to_exist", "kwargs": {"column": "a", "zip": 1}}, "'zip': extra fields not permitted"),
    ],
)
def test_an_expectation_that_is_not_known_or_wrongly_asked_is_named(
    tmp_path: Path, rows: Path, expectation: object, says: str
) -> None:
    good = {"type": "expect_column_to_exist", "kwargs": {"column": "origin"}}
    with pytest.raises(BadInput, match=f"suite.json, expectation 2.*{says}"):
        GreatExpectationsContract().check(suite(tmp_path, good, expectation), rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expectations: []", "expects nothing"),
        ("a: [", "neither YAML nor JSON"),
        ("- 1", "a list under 'expectations'"),
        ("expectations: [expect_x]", "expectation 1: is written as `type:`"),
        ("expectations: [{type: x, kwarg: {}}]", "did you mean 'kwargs'"),
        ("expectations: [{type: x, kwargs: [1]}]", "kwargs is a mapping"),
    ],
)
def test_a_suite_of_another_shape_is_refused_before_anything_is_started(
    tmp_path: Path, rows: Path, text: str, says: str
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=says):
        GreatExpectationsContract(timeout_s=0.0).check(path, rows)


def test_files_that_are_not_there_are_named(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.yaml: no such suite"):
        GreatExpectationsContract().check(tmp_path / "nowhere.yaml", rows)
    good = suite(tmp_path, {"type": "expect_column_to_exist", "kwargs": {"column": "origin"}})
    with pytest.raises(BadInput, match=r"none\.csv: no such file"):
        GreatExpectationsContract().check(good, tmp_path / "none.csv")


def test_a_check_that_does_not_end_is_ended(tmp_path: Path, rows: Path) -> None:
    good = suite(tmp_path, {"type": "expect_column_to_exist", "kwargs": {"column": "origin"}})
    with pytest.raises(PortError, match=r"not checked on rows.csv within 0.01 s"):
        GreatExpectationsContract(timeout_s=0.01).check(good, rows)


@pytest.mark.e2e
def test_the_flights_suite_of_the_library_is_met_by_sound_rows_and_not_by_slips_beyond_the_worlds_bounds(
    tmp_path: Path,
) -> None:
    sound = {"label": "0", "origin": "EWR", "carrier": "UA", "dest": "IAH", "distance": "1400", "sched_dep_time": "515"}
    sound |= {"sched_arr_time": "819", "day_of_week": "2", "flights_this_hour": "6", "airport_delay": "-1.5"}
    sound |= {"seats": "-1", "plane_age": "14", "humid": "59.4", "wind_dir": "260", "wind_speed": "12.7"}
    sound |= {"wind_gust": "12.7", "precip": "0.0", "pressure": "1011.9", "visib": "10.0"}
    lines = [",".join(sound)]
    for i in range(600):
        slip = {"origin": "BOS", "sched_dep_time": "3999"} if i == 599 else {}
        lines.append(",".join((sound | {"label": str(int(i % 4 == 0))} | slip).values()))
    suite = Path(__file__).parents[2] / "policies" / "library" / "flights-expectations.yaml"
    rows = tmp_path / "rows.csv"
    rows.write_text("\n".join(lines[:-1]))
    assert GreatExpectationsContract().check(suite, rows).breaches == ()
    rows.write_text("\n".join(lines))
    breaches = GreatExpectationsContract().check(suite, rows).breaches
    assert [breach.column for breach in breaches] == ["origin", "sched_dep_time"]
