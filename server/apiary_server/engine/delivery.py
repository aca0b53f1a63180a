"""From the engine thread to asyncio: one hand-off a step, and a bounded buffer for each stream.

HTTP/2 flow control bounds the bytes in flight, not the tokens that wait for a slow reader. So each stream has
one buffer in which unread deltas merge, and the engine pauses a turn whose buffer is full
(`TokenStream.full`) and ends it when its reader takes nothing for the stall limit (`TokenStream.stalled`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Self

from apiary_server.engine.result import Delta
from apiary_server.errors import ApiaryError


class TokenStream:
    """One turn's answer on its way to its reader: an async iterator of deltas, of which the last has a
    `finish_reason`; or raises the error that ended the turn.

    Args:
        loop: the event loop of the reader.
        capacity: how many tokens may wait.
        stall_limit: seconds that a reader may leave tokens waiting.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, capacity: int, stall_limit: float) -> None:
        self.loop = loop
        self.closed = False
        self._capacity = capacity
        self._stall_limit = stall_limit
        self._awaited: asyncio.Future[None] | None = None  # by the reader
        self._delta: Delta | None = None
        self._error: ApiaryError | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._on_close: Callable[[], object] = lambda: None
        # written by one side each, read by the other
        self._sent = 0
        self._taken = 0
        self._taken_at = time.monotonic()

    # the engine's side

    @property
    def full(self) -> bool:
        """Whether the turn should pause."""
        return not self.closed and self._sent - self._taken >= self._capacity

    def stalled(self, now: float) -> bool:
        """Whether the reader has left tokens waiting for longer than the stall limit."""
        return self._sent > self._taken and now - self._taken_at > self._stall_limit

    def count(self, tokens: int) -> None:
        """Note tokens that are on their way."""
        if self._sent == self._taken:
            self._taken_at = time.monotonic()
        self._sent += tokens

    def seal(self) -> int:
        """Let the reader take no more tokens. Returns how many it has taken."""
        with self._lock:
            self.closed = True
            return self._taken

    # the reader's side

    def close(self) -> None:
        """The reader is gone: the engine ends the turn within one step. From any thread, any often."""
        self.closed = True
        self._on_close()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have something done when the reader goes, or now if it has."""
        self._on_close = callback
        if self.closed:
            callback()

    def put(self, delta: Delta | ApiaryError) -> None:
        """Add what came of a step (on the event loop)."""
        if isinstance(delta, ApiaryError):
            self._error = delta
        elif self._delta is None:
            self._delta = delta
        else:
            self._delta.merge(delta)
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._ended:
            if self._delta is None and self._error is None:
                self._awaited = self.loop.create_future()
                await self._awaited
            with self._lock:
                delta, self._delta = self._delta, None
                if delta is None:
                    self._ended = True
                    raise self._error or RuntimeError("a stream was woken with nothing to read")
                self._ended = delta.finish_reason is not None
                if self.closed:
                    continue
                self._taken += len(delta.token_ids)
            self._taken_at = time.monotonic()
            return delta
        raise StopAsyncIteration


class Delivery:
    """Gathers a step's deltas and hands them over at once. Not thread-safe."""

    def __init__(self) -> None:
        self._step: list[tuple[TokenStream, Delta | ApiaryError]] = []

    def send(self, stream: TokenStream, delta: Delta | ApiaryError) -> None:
        """Add to the step's hand-off."""
        if isinstance(delta, Delta):
            stream.count(len(delta.token_ids))
        self._step.append((stream, delta))

    def flush(self) -> None:
        """Hand the step over: one call into each event loop that reads (there is one, outside of tests)."""
        by_loop = defaultdict(list)
        for stream, delta in self._step:
            by_loop[stream.loop].append((stream, delta))
        self._step = []
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop is closed: its readers are gone
                for stream, _ in batch:
                    stream.close()


def deliver(stream: TokenStream, delta: Delta | ApiaryError) -> None:
    """Hand one thing over, from any thread."""
    delivery = Delivery()
    delivery.send(stream, delta)
    delivery.flush()


def _put_all(batch: list[tuple[TokenStream, Delta | ApiaryError]]) -> None:
    for stream, delta in batch:
        stream.put(delta)
