"""The main job, end to end, as the README's first command runs it: real servers, real data, live traffic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

MEMORY_MAX = 3 * 2**30


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "demo", "--keep", str(home), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )


def belonging(home: Path) -> list[psutil.Process]:
    """Every process that names the demo's folder in its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(home) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def memory(process: subprocess.Popen[str]) -> int:
    """Bytes that the process and its children hold, shared pages shared out (PSS)."""
    total = 0
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for each in family:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def test_one_good_version_is_promoted_two_bad_ones_are_taken_back_and_no_request_fails(tmp_path: Path) -> None:
    told, log = tmp_path / "demo.json", tmp_path / "demo.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "demo", "--keep", str(tmp_path / "demo"), "--json", str(told)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        most = 0
        while process.poll() is None:
            most = max(most, memory(process))  # type: ignore[arg-type]
            time.sleep(1.0)
    print(f"the demo's memory at most: {most / 2**20:.0f} MB\n{log.read_text()}")
    assert process.returncode == 0, log.read_text()
    document = json.loads(told.read_text())
    assert [(each["version"], each["outcome"]) for each in document["deliveries"]] == [
        ("1", "promoted"),
        ("2", "promoted"),
        ("3", "rolled_back"),
        ("4", "rolled_back"),
    ]
    second, third, fourth = document["deliveries"][1:]
    assert second["candidate_requests"] > 0
    assert third["reason"].startswith("drift")
    assert fourth["reason"].startswith(("errors", "latency"))
    assert document["clients"]["failed"] == 0
    assert document["clients"]["requests"] > 10_000
    assert not belonging(tmp_path / "demo")
    assert most < MEMORY_MAX


@pytest.mark.parametrize("until", ["Prefect is ready", "v1: pending"])
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, until: str) -> None:
    process = start(tmp_path / "demo")
    assert process.stdout is not None
    for line in process.stdout:
        if until in line:
            break
    assert belonging(tmp_path / "demo"), "it had started something"
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    deadline = time.monotonic() + 10  # what was killed may still be on its way out
    while belonging(tmp_path / "demo") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not belonging(tmp_path / "demo")
