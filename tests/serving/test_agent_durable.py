"""What the agent keeps on disk: whole or not at all, bounded, checked."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.agent_errors import BadRequest, NotDurable
from serving.durable import EVENTS_KEPT, UNUSED_MODELS_KEPT, EventLog, ModelStore, read_json, write_durably


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_durably(path, b"old")
    with pytest.raises(NotDurable, match="could not write"):
        write_durably(path / "below-a-file", b"new")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(NotDurable):
        write_durably(folder, b"a folder cannot be replaced")
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "state.json"]


def test_only_the_owner_can_read_what_is_written(tmp_path: Path) -> None:
    write_durably(tmp_path / "token", b"secret")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def test_a_state_file_that_is_no_json_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert read_json(tmp_path / "state.json") is None
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(BadRequest, match=r"state\.json is not JSON .* remove it"):
        read_json(tmp_path / "state.json")


def test_the_store_keeps_the_bytes_that_have_the_digest_and_no_others(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    source = tmp_path / "m.onnx"
    source.write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    with pytest.raises(BadRequest, match=f"has the digest {digest}, not {'0' * 64}"):
        store.add(source, "0" * 64)
    assert list((tmp_path / "models").iterdir()) == []
    kept = store.add(source, digest)
    source.unlink()
    assert store.add(source, digest) == kept
    kept.write_bytes(b"rotten")
    with pytest.raises(BadRequest, match="cannot read the model file"):
        store.add(source, digest)
    source.write_bytes(b"model")
    assert store.add(source, digest).read_bytes() == b"model"


def test_the_store_keeps_all_used_bytes_and_a_few_more(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    digests = []
    for number in range(UNUSED_MODELS_KEPT + 5):
        source = tmp_path / "m.onnx"
        source.write_bytes(bytes([number]))
        digests.append(hashlib.sha256(bytes([number])).hexdigest())
        store.add(source, digests[-1])
    store.prune(digests[:3])
    assert len(list((tmp_path / "models").iterdir())) == UNUSED_MODELS_KEPT + 3
    assert all(store.path(digest).exists() for digest in digests[:3])


def test_the_same_bytes_may_come_twice_at_once(tmp_path: Path) -> None:
    """Two models, or a trial and its version, may be made of the same bytes."""
    source, data = tmp_path / "m.onnx", bytes(2**22)
    source.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    for turn in range(5):
        store = ModelStore(tmp_path / f"models-{turn}")
        with ThreadPoolExecutor(4) as pool:
            kept = [adding.result() for adding in [pool.submit(store.add, source, digest) for _ in range(8)]]
        assert [path.read_bytes() == data for path in kept] == [True] * 8
        assert [path.name for path in kept[0].parent.iterdir()] == [kept[0].name]


def test_what_a_killed_agent_left_half_copied_is_gone_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "0.1.part").write_bytes(b"half of it")
    ModelStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_asked_for_again_are_not_the_next_to_go(tmp_path: Path) -> None:
    """A rollback to an old version may wait for them while another version leaves."""
    store = ModelStore(tmp_path)
    digests = []
    for number in range(UNUSED_MODELS_KEPT + 1):
        source = tmp_path / "m"
        source.write_bytes(bytes([number]))
        digests.append(hashlib.sha256(bytes([number])).hexdigest())
        os.utime(store.add(source, digests[-1]), (number, number))
    kept = store.add(source, digests[0])
    store.prune([])
    assert kept.exists()
    assert not store.path(digests[1]).exists()


def test_events_are_numbered_through_restarts_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for number in range(3 * EVENTS_KEPT):
        log.add("kind", f"event {number}")
    assert len(path.read_bytes().splitlines()) <= 2 * EVENTS_KEPT
    with path.open("ab") as file:
        file.write(b'{"n": cut off')
    again = EventLog(path)
    assert again.add("kind", "one more")["n"] == 3 * EVENTS_KEPT + 1
    assert [event["n"] for event in again.after(3 * EVENTS_KEPT - 1)] == [3 * EVENTS_KEPT, 3 * EVENTS_KEPT + 1]
    assert len(again.after(0)) == EVENTS_KEPT
    assert EventLog(path).after(3 * EVENTS_KEPT)[0]["says"] == "one more"


def test_an_event_after_one_that_a_full_disk_cut_off_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.add("kind", "first")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, before[1]))
    try:
        log.add("kind", "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes().splitlines()[1:] == [b'{"n": 2, ']
    log.add("kind", "third")
    assert [event["says"] for event in log.after(0)] == ["first", "second", "third"]
    assert [event["says"] for event in EventLog(path).after(0)] == ["first", "third"]


def test_an_event_that_cannot_be_written_is_still_told(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "no-such-folder" / "events.jsonl")
    log.add("lease-lost", "the lease ran out")
    assert [json.dumps(event["kind"]) for event in log.after(0)] == ['"lease-lost"']
