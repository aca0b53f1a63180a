"""`apiary status`."""

from __future__ import annotations

import json

import pytest

from ..conftest import Run
from ..fake_worker import FakeWorker

WHY = (
    "sessions: /var/lib/apiary/sessions.db: database or disk is full; caches: [Errno] No space left on device"
)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "none: sessions end with the worker"),
        ({"stored_budget_bytes": 2**30}, "works"),
        ({"stored_budget_bytes": 2**30, "unread_sessions": 3}, "3 sessions could not be read"),
        ({"stored_budget_bytes": 2**30, "store_degraded": True, "store_error": WHY}, f"degraded: {WHY}"),
    ],
    ids=["none", "works", "unread", "degraded"],
)
def test_the_store_is_told_in_words(
    apiary: Run, worker: FakeWorker, fields: dict[str, int | str], said: str
) -> None:
    for name, value in fields.items():
        setattr(worker.capacity, name, value)
    done = apiary("status")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("store "))
    assert said in line


def test_what_is_in_use(apiary: Run, worker: FakeWorker) -> None:
    worker.capacity.resident_sessions, worker.capacity.running_turns = 7, 3
    worker.capacity.max_resident_sessions, worker.capacity.slot_bytes = 9, 5 * 10**6
    said = apiary("status").stdout
    assert "models/fake" in said
    assert "7 of at most 9 of 5.0 MB (by the default policy), 1.0 MB of 1.1 GB" in said
    assert "3 in flight, 0 of at most 256 waiting" in said


def test_json_for_programs(apiary: Run, worker: FakeWorker) -> None:
    worker.capacity.store_error = WHY
    said = json.loads(apiary("status", "--json").stdout)
    assert said["model"]["name"] == "models/fake"
    assert said["capacity"]["store_error"] == WHY
