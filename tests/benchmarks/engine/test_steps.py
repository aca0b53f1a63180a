"""The engine's steps as an observer sees them."""

from __future__ import annotations

import pytest

from apiary_bench.engine import steps
from apiary_bench.engine.steps import Steps
from apiary_server.engine.result import StepStats


def stats(decode: int, prefill: int = 0) -> StepStats:
    return StepStats(
        duration=0.5,
        prefill_tokens=prefill,
        decode_tokens=decode,
        compactions=0,
        evicted_entries=0,
        running_turns=decode,
        queued_turns=0,
        used_bytes=0,
        parked_bytes=0,
        resident_sessions=0,
        sessions=0,
    )


def test_steps_in_which_all_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 2.5, 4.5, 7.5, 11.5, 16.5, 22.5])
    monkeypatch.setattr(steps, "perf_counter", lambda: next(now))
    seen = Steps()
    for each in (stats(3), stats(0, 6), stats(3), stats(3, 1), stats(2), stats(3)):
        seen.step(each)
    assert seen.decoding(3) == [2.0, 5.0]  # of the first nobody knows when it began
    assert seen.decoding(2) == [4.0]
    seen.clear()
    seen.step(stats(3))
    assert seen.decoding(3) == []
