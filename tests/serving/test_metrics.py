"""What is counted is what happened, in a text that Prometheus' own parser reads."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from policies.evidence import LATENCY_EDGES_MS, SCORE_EDGES
from serving.metrics import Histogram, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            mark = sample.labels.get("le") or sample.labels.get("code") or sample.labels.get("epoch") or ""
            found[sample.name, mark] = sample.value
    return found


def test_the_text_is_what_was_counted() -> None:
    metrics = Metrics('a "name"', "1\\2", "e0")
    for code, latency in ((200, 0.05), (200, 3.0), (400, 0.2), (500, 1e9)):
        metrics.answered(code, latency)
    found = samples(metrics)
    assert found["lockgate_requests_total", "200"] == 2
    assert found["lockgate_requests_total", "500"] == 1
    assert found["lockgate_errors_total", ""] == 1
    assert found["lockgate_latency_ms_bucket", "0.1"] == 1
    assert found["lockgate_latency_ms_bucket", "+Inf"] == 4
    assert found["lockgate_latency_ms_count", ""] == 4
    assert found["lockgate_process_epoch", "e0"] == 1
    assert found["process_resident_memory_bytes", ""] > 1e6


def test_the_edges_are_those_of_the_evidence() -> None:
    """Whoever reads the buckets back finds exactly the edges that the gates reckon with."""
    found = samples(Metrics("m", "1", "e"))
    for name, edges in (("latency_ms", LATENCY_EDGES_MS), ("prediction", SCORE_EDGES)):
        marks = [mark for series, mark in found if series == f"lockgate_{name}_bucket" and mark != "+Inf"]
        assert tuple(map(float, marks)) == edges


def test_labels_are_escaped() -> None:
    families = list(text_string_to_metric_families(Metrics('a "name"', "1\\2", "e").text().decode()))
    assert families[0].samples[0].labels["model"] == 'a "name"'
    assert families[0].samples[0].labels["version"] == "1\\2"


@example([float("-inf"), float("inf"), float("nan"), 0.0, 0.05, 0.5, 0.99, 2.0])
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=40))
def test_many_at_once_are_counted_as_one_by_one(values: list[float]) -> None:
    """Also NaN and infinities, which count beyond the last edge and not in the sum."""
    together, single = Histogram(SCORE_EDGES), Histogram(SCORE_EDGES)
    together.add_many(np.array(values))
    for value in values:
        single.add_many(np.array([value]))
    assert together.counts == single.counts
    assert sum(together.counts) == len(values)
    assert np.isfinite(together.total) or abs(together.total) > 1e38


def test_an_upper_edge_belongs_to_its_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.add(1.0)
    histogram.add_many(np.array([1.0] * 10))
    assert histogram.counts == [11, 0, 0]
