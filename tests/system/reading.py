"""What comes of a stream and when, and how two answers to one request are compared."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from apiary_client import ApiaryError, Completion, Delta, Stopping, TokenLogprob, Usage

# Float sums differ between batches: where the model's two likeliest tokens are this close, either may win.
TIE = 2e-3


@dataclass
class Reading:
    """The deltas of one stream, their times of arrival (monotonic seconds), and the error that ended it."""

    deltas: list[Delta] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: ApiaryError | None = None

    def take(self, delta: Delta) -> None:
        """Note one that has just come."""
        self.times.append(time.monotonic())
        self.deltas.append(delta)

    async def follow(self, stream: AsyncIterator[Delta]) -> None:
        """Read to the end."""
        try:
            async for delta in stream:
                self.take(delta)
        except ApiaryError as error:
            self.error = error

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return tuple(one for delta in self.deltas for one in delta.logprobs)

    @property
    def usage(self) -> Usage:
        usage = self.deltas[-1].usage
        assert usage is not None, self.error
        return usage

    @property
    def longest_gap(self) -> float:
        """Seconds."""
        return max(later - earlier for earlier, later in itertools.pairwise(self.times))


class Reader(threading.Thread):
    """Reads one stream in a thread of its own."""

    def __init__(self, stream: Iterator[Delta]) -> None:
        super().__init__(daemon=True)
        self.reading = Reading()
        self.begun = threading.Event()
        self._stream = stream
        self.start()

    def run(self) -> None:
        try:
            for delta in self._stream:
                self.reading.take(delta)
                self.begun.set()
        except ApiaryError as error:
            self.reading.error = error
        self.begun.set()

    def end(self, seconds: float = 60.0) -> Reading:
        """Wait for the stream's end."""
        self.join(seconds)
        assert not self.is_alive(), f"still streaming after {seconds} s"
        return self.reading


def tokens(count: int) -> Stopping:
    """Exactly this many tokens."""
    return Stopping(max_tokens=count, ignore_eos=True)


def check_same(token_ids: tuple[int, ...], alone: Completion) -> None:
    """Check that a greedy answer is the one that the model gives when nothing runs beside it.

    `alone` has logprobs with one alternative at least. After a tie the two may differ; no tie may come early,
    or the check would be empty.
    """
    tie = next((place for place, one in enumerate(alone.logprobs) if _margin(one) < TIE), None)
    assert tie is None or tie > 8, "a tie comes too early: choose another prompt"
    assert token_ids[:tie] == alone.token_ids[:tie]


def _margin(one: TokenLogprob) -> float:
    first, second = one.top[:2]
    return first.logprob - second.logprob
