"""Sampled answers joined with the labels that come for them: losses, added up as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from infra.labels_arrow import LabelStore
from infra.samples_arrow import SampledRows
from policies.evidence import NONE, Outcomes, Sums

ROWS_MAX = 200_000  # of each version, that wait for labels; and labels that wait for answers
_SETTLE_S = 3.0  # segments are written every second, and a copy may be answered after the original
_CUTOFF = 0.5
_OVER_S = 600.0  # a rollout that has not asked for so long has ended

Key = tuple[str, int]


@dataclass
class _Version:
    """A version's answers that have no label yet, as (prediction, time), oldest first; read up to `until`."""

    until: float
    waiting: dict[Key, tuple[float, float]] = field(default_factory=dict)


@dataclass
class _Counted:
    """What has been counted for one pair of versions."""

    since: float
    stable: _Version
    candidate: _Version
    pairs: Sums = NONE
    alone: tuple[Sums, Sums] = (NONE, NONE)  # of the stable version, of the candidate
    labels: dict[Key, tuple[float, float]] = field(default_factory=dict)
    segment: int = 0
    asked: float = 0.0  # POSIX seconds


def loss(metric: str, prediction: float, label: float) -> float:
    """From 0 to 1. No number, as a prediction, is as wrong as can be."""
    if not math.isfinite(prediction):
        return 1.0
    if metric == "accuracy":
        return float((prediction >= _CUTOFF) != (label >= _CUTOFF))
    return float(min((prediction - label) ** 2, 1.0))


def answers(table: pa.Table, after: float, until: float) -> Iterator[tuple[Key, tuple[float, float]]]:
    """The (prediction, time) of each sampled row that was answered in (after, until]. Failed requests are left out:
    they are the errors gate's business."""
    if not table.num_rows:
        return
    columns = (table[each].to_pylist() for each in ("request_id", "row", "prediction", "time", "status"))
    for request, row, prediction, at, status in zip(*columns, strict=True):
        if after < at <= until and status < 400:
            yield (request, row), (float("nan") if prediction is None else float(prediction), at)


def labels(table: pa.Table) -> Iterator[tuple[Key, tuple[float, float]]]:
    """The (label, when it came) of each row of a segment of labels."""
    columns = (table[each].to_pylist() for each in ("request_id", "row", "label", "came"))
    for request, row, label, came in zip(*columns, strict=True):
        yield (request, row), (label, came)


def added(requests: Iterable[list[float]]) -> Sums:
    """One observation per request, the mean over its rows, since those are not independent."""
    means = [sum(values) / len(values) for values in requests]
    return Sums(float(len(means)), float(sum(means)), float(sum(value * value for value in means)))


class LabelledAnswers:
    """Joins samples and labels under an agent's home. Several rollouts may ask, each from a thread of its own.

    A request counts once, when its labels come: later labels of it change nothing that was counted. Rows of one request
    that are labelled together are one observation, their mean, since they are not independent. Of more than `ROWS_MAX`
    answers without a label the oldest are forgotten.
    """

    def __init__(self, agent_home: Path) -> None:
        self._samples, self._labels = SampledRows(agent_home), LabelStore(agent_home)
        self._counted: dict[tuple[str, str, str, str, float], _Counted] = {}

    def outcomes(self, model: str, stable: str, candidate: str, metric: str, since: float, wait: float) -> Outcomes:
        """What the labels that have come say of both versions' answers since then. Raises PortError."""
        key = (model, stable, candidate, metric, since)
        now = time.time()
        counted = self._counted.setdefault(key, _Counted(since, _Version(since), _Version(since), asked=now))
        counted.asked = now
        for each, other in list(self._counted.items()):
            if other.asked < now - _OVER_S:
                self._counted.pop(each, None)
        for version, name in ((counted.stable, stable), (counted.candidate, candidate)):
            self._read(version, model, name, now - _SETTLE_S, now - wait)
        self._read_labels(counted, model)
        _join(counted, metric, wait)
        waiting = len(counted.candidate.waiting)
        return Outcomes(since, counted.pairs, counted.alone[1], counted.alone[0], waiting)

    def _read(self, version: _Version, model: str, name: str, until: float, oldest: float) -> None:
        """Takes in the answers up to `until`, and forgets those from before `oldest`, whose labels never came."""
        if until > version.until:
            table = self._samples.read(model, name, version.until)
            version.waiting.update(answers(table, version.until, until))
            version.until = until
        _keep_newest(version.waiting)
        late = [key for key, (_, at) in version.waiting.items() if at < oldest]
        for each in late:
            del version.waiting[each]

    def _read_labels(self, counted: _Counted, model: str) -> None:
        for number, whole in self._labels.after(model, counted.segment):
            table = whole.filter(pc.greater_equal(whole["came"], counted.since))  # no label comes before its answer
            for key, label in labels(table):
                counted.labels.pop(key, None)  # the later one wins, and is the newest
                counted.labels[key] = label
            counted.segment = number
            _keep_newest(counted.labels)


def _keep_newest(waiting: dict[Key, tuple[float, float]]) -> None:
    for key in list(waiting)[: max(len(waiting) - ROWS_MAX, 0)]:
        del waiting[key]


def _join(counted: _Counted, metric: str, wait: float) -> None:
    """Counts the answers whose label has come."""
    both: dict[str, list[float]] = {}
    single: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    sides = counted.stable.waiting, counted.candidate.waiting
    for key in [each for each in counted.labels if each in sides[0] or each in sides[1]]:
        label, came = counted.labels.pop(key)
        found = [side.pop(key, None) for side in sides]
        losses = [None if each is None or came - each[1] > wait else loss(metric, each[0], label) for each in found]
        if losses[0] is not None and losses[1] is not None:
            both.setdefault(key[0], []).append(losses[1] - losses[0])
            continue
        for side, each in zip(single, losses, strict=True):
            if each is not None:
                side.setdefault(key[0], []).append(each)
    counted.pairs = counted.pairs.plus(added(both.values()))
    counted.alone = (
        counted.alone[0].plus(added(single[0].values())),
        counted.alone[1].plus(added(single[1].values())),
    )
