"""The flights: nothing of what came after departure, cancelled and diverted flights told apart."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from infra import flights

HEAD = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,origin,"
    "dest,air_time,distance,hour,minute,time_hour"
)


@pytest.fixture
def rows(tmp_path: Path) -> pd.DataFrame:
    """Four flights from JFK on 1 April (UTC-4): on time but for 40 minutes, late, cancelled, diverted."""
    lines = [
        "2013,4,1,940,900,40,1100,1110,10,AA,1,N1,JFK,BOS,60,187,9,0,2013-04-01T13:00:00Z",
        "2013,4,1,1031,1030,1,1300,1230,30,AA,2,N1,JFK,BOS,60,187,10,30,2013-04-01T14:00:00Z",
        "2013,4,1,NA,1100,NA,NA,1310,NA,AA,3,NA,JFK,BOS,NA,187,11,0,2013-04-01T15:00:00Z",
        "2013,4,1,1200,1200,0,NA,1410,NA,AA,4,N9,JFK,BOS,NA,187,12,0,2013-04-01T16:00:00Z",
    ]
    import zipfile

    with zipfile.ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", "\n".join([HEAD, *lines]) + "\n")
    (tmp_path / "planes.csv").write_text("tailnum,year,seats\nN1,2003,55\n")
    (tmp_path / "weather.csv").write_text(
        "origin,humid,wind_dir,wind_speed,wind_gust,precip,pressure,visib,time_hour\n"
        "JFK,50,180,10,NA,0,1010,10,2013-04-01T13:00:00Z\n"
        "JFK,60,NA,1048,NA,0,NA,9,2013-04-01T14:00:00Z\n"
    )
    return flights.read_flights(tmp_path)


def test_late_is_1_diverted_is_1_cancelled_is_unknown(rows: pd.DataFrame) -> None:
    assert rows[flights.LABEL].fillna(-1).tolist() == [0, 1, -1, 1]
    assert len(flights.labelled(rows)) == 3


def test_exactly_15_minutes_is_not_late() -> None:
    assert flights.label_of(pd.Series([900.0, 900.0]), pd.Series([15.0, 16.0])).tolist() == [0, 1]


def test_only_delays_of_flights_that_had_left_an_hour_before_are_known(rows: pd.DataFrame) -> None:
    """The first left at 9:40: within 1 to 3 hours before 11:00 and 12:00, too late to be known at 10:30."""
    assert rows["airport_delay"].tolist() == pytest.approx([0, 0, 40, (40 + 1) / 2])


def test_no_column_tells_what_came_after_departure() -> None:
    after = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", flights.LABEL}
    assert not after & set(flights.COLUMNS)


def test_the_latest_reading_at_or_before_departure_counts_and_gaps_take_the_last_report(rows: pd.DataFrame) -> None:
    assert rows["humid"].tolist() == [50, 60, 60, 60]
    assert rows["pressure"].tolist() == [1010] * 4
    assert rows["wind_speed"].tolist() == [10] * 4, "a wind of 1,048 mph is no reading"
    assert rows["wind_dir"].tolist() == [180, -1, -1, -1]


def test_an_aircraft_in_no_register_is_told_as_unknown(rows: pd.DataFrame) -> None:
    assert rows["seats"].tolist() == [55, 55, -1, -1]
    assert rows["plane_age"].tolist() == [10, 10, -1, -1]


def test_no_input_is_ever_missing(rows: pd.DataFrame) -> None:
    assert not rows[list(flights.COLUMNS)].isna().any().any()


def test_days_are_new_yorks(rows: pd.DataFrame) -> None:
    assert len(flights.between(rows, "2013-04-01", "2013-04-02")) == 4
    assert len(flights.between(rows, "2013-03-31", "2013-04-01")) == 0


def test_a_missing_file_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(flights.FlightsNotInstalled, match=r"flights\.csv\.zip.*pip install"):
        flights.read_flights(tmp_path)
