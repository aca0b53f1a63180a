"""How far a benchmark is."""

from __future__ import annotations

from apiary_bench.progress import begin


def test_a_stage_counts_up() -> None:
    heard: list[tuple[str, int, int]] = []
    done = begin(lambda *said: heard.append(said), "turns", 2)
    assert heard == [("turns", 0, 2)]
    done()
    done()
    assert heard[1:] == [("turns", 1, 2), ("turns", 2, 2)]
