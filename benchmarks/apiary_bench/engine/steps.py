"""When the engine's steps ended."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter

from apiary_server.engine.result import Observer, StepStats


class Steps(Observer):
    """Notes each step of an engine as it ends."""

    def __init__(self) -> None:
        self._ended: list[tuple[float, StepStats]] = []

    def step(self, stats: StepStats) -> None:
        """A step ended (on the engine thread)."""
        self._ended.append((perf_counter(), stats))

    def clear(self) -> None:
        """Forget them."""
        self._ended = []

    def decoding(self, sessions: int) -> list[float]:
        """The time, in seconds, of each step in which so many sessions computed one generated token each, and
        nothing else was computed.

        It is counted from the end of the step before, so it has all in it that the engine does for a token:
        scheduling, the forward pass, sampling, compaction, detokenising and delivery.
        """
        return [
            after - before
            for (before, _), (after, stats) in pairwise(self._ended)
            if stats.decode_tokens == sessions and not stats.prefill_tokens
        ]
