"""The clients: every row once and in order, open load, every failure told, a clean stop."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from infra.clients_replay import FAILURES_KEPT, Bodies, Replay, RowsUnusable, Tally, order, run

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    table = {"carrier": ["AA", "UA", "B6"], "x": pa.array([1.5, 2.5, 3.5], pa.float32()), "label": [1.0, None, 0.0]}
    pq.write_table(pa.table(table), path)
    return path


def replayed(rows: Path, out: Path, answer: Answer, **options: Any) -> Tally:
    async def go() -> Tally:
        app = web.Application()
        app.router.add_post("/v2/models/flight-delay/infer", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            replay = Replay(f"http://127.0.0.1:{port}", "flight-delay", rps=2000, **options)
            return await run(replay, Bodies(rows, "label"), out, options_stop)
        finally:
            await runner.cleanup()

    options_stop = asyncio.Event()
    return asyncio.run(go())


def test_a_body_has_an_input_per_column_and_never_the_label(rows: Path) -> None:
    body = json.loads(Bodies(rows, "label")(1))
    assert body == {
        "inputs": [
            {"name": "carrier", "shape": [1, 1], "datatype": "BYTES", "data": ["UA"]},
            {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [2.5]},
        ]
    }


def test_after_the_last_row_only_the_rows_to_be_repeated_come_again() -> None:
    assert list(itertools.islice(order(4, 2), 9)) == [0, 1, 2, 3, 2, 3, 2, 3, 2]
    assert list(itertools.islice(order(2, 7), 4)) == [0, 1, 1, 1]


def test_every_row_is_asked_once_in_order_and_counted_in_the_file(rows: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((await request.json())["inputs"][0]["data"][0])
        return web.json_response({"outputs": []})

    tally = replayed(rows, tmp_path / "out.json", answer, clients=1, rows_max=5, repeat_from=1)
    assert seen == ["AA", "UA", "B6", "UA", "B6"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert (tally.requests, written["requests"], written["failed"], written["running"]) == (5, 5, 0, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "rows.parquet"]


def test_an_answer_without_200_or_without_outputs_or_no_answer_is_a_failure_with_its_reason(
    rows: Path, tmp_path: Path
) -> None:
    async def answer(request: web.Request) -> web.Response:
        carrier = (await request.json())["inputs"][0]["data"][0]
        if carrier == "AA":
            return web.Response(status=503, text="no version is ready")
        if carrier == "UA":
            return web.json_response({"detail": "odd"})
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    tally = replayed(rows, tmp_path / "out.json", answer, clients=1, rows_max=3)
    assert (tally.requests, tally.failed) == (3, 3)
    first, second, third = tally.failures
    assert (first["row"], first["status"], first["error"]) == (0, 503, "no version is ready")
    assert second["status"] == 200
    assert "without outputs" in second["error"]
    assert third["status"] is None
    assert "Disconnected" in third["error"]


def test_a_stop_sends_nothing_more_and_is_written(rows: Path, tmp_path: Path) -> None:
    async def go() -> Tally:
        stop = asyncio.Event()
        stop.set()
        return await run(Replay("http://127.0.0.1:1", "m", 100), Bodies(rows, "label"), tmp_path / "out.json", stop)

    assert asyncio.run(go()).requests == 0
    assert json.loads((tmp_path / "out.json").read_text())["running"] is False


def test_only_the_newest_failures_are_kept_but_all_are_counted() -> None:
    tally = Tally()
    for row in range(100):
        tally.add(row, 1.0, (500, "x" * 5000), at=float(row))
    assert tally.failed == 100
    assert [failure["row"] for failure in tally.failures] == list(range(100 - FAILURES_KEPT, 100))
    assert max(len(failure["error"]) for failure in tally.failures) <= 300


def test_quantiles_are_never_below_the_true_ones_nor_more_than_a_bucket_above() -> None:
    tally = Tally()
    for latency in range(1, 1001):
        tally.add(0, float(latency), None, at=0.0)
    for share in (0.5, 0.9, 0.99, 1.0):
        assert 1000 * share <= tally.quantile_ms(share) <= 1000 * share * 1.13
    assert Tally().quantile_ms(0.5) == 0.0


@pytest.mark.parametrize(
    ("column", "said"),
    [(pa.array([1.0, None]), "column 'x' has 1 nulls"), (pa.array([[1], [2]]), "column 'x' is of type list")],
)
def test_rows_that_json_cannot_carry_are_refused_by_the_columns_name(tmp_path: Path, column: Any, said: str) -> None:
    pq.write_table(pa.table({"x": column}), tmp_path / "rows.parquet")
    with pytest.raises(RowsUnusable, match=said):
        Bodies(tmp_path / "rows.parquet", "label")


def test_a_missing_file_and_an_impossible_rate_are_told() -> None:
    with pytest.raises(RowsUnusable, match=r"absent\.parquet"):
        Bodies(Path("absent.parquet"), "label")
    with pytest.raises(RowsUnusable, match="0 requests a second"):
        Replay("http://localhost", "m", 0)
