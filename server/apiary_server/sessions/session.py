"""A conversation: its transcript, its cache, its settings, its owner."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from apiary_server.sessions.info import RebuildReason, SessionInfo, State
from apiary_server.sessions.pool import Lease, SlotLayout
from buzz import Cache, Policy


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One committed turn: how many tokens of the transcript it appended, and how.

    `chat` turns were rendered with the template, so the next messages must first close the reply. `seen` is
    how many of the session's tokens the cache had then; the others came with the next turn's prompt. The rest
    is what to say when the same request comes again: it is known by `request_id`, if it had one, and its
    `digest`. `tail` is text of the answer that no token of it has: a stop string may begin within a token.
    """

    prompt_tokens: int
    completion_tokens: int
    chat: bool
    seen: int
    finish: str = ""
    seed: int = 0
    cached_tokens: int = 0
    evicted_entries: int = 0
    tail: str = ""
    request_id: str | None = None
    digest: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens of the transcript are its."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """A committed turn of a session and the tokens of its answer."""

    session: Session
    record: TurnRecord
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Waiter:
    """Whoever stands in line for a session's turn; `abandoned` tells whether the reader has gone."""

    held: Future[Session]
    abandoned: Callable[[], bool]


@dataclass(eq=False, slots=True)
class Session:
    """One conversation. The cache fields (`cache`, `lease`, `parked`) belong to the engine thread;
    the others are guarded by the `SessionManager`'s lock. A one-shot request has a session without `id`."""

    id: str
    tenant: str
    policy: Policy
    layout: SlotLayout
    ttl: float | None = None
    expire_time: float = float("inf")
    labels: Mapping[str, str] = field(default_factory=dict)
    create_time: float = field(default_factory=time.time)
    update_time: float = 0.0
    # committed tokens; the cache has all of them but the last `len(transcript) - cache.seen`, which were
    # sampled and never fed back
    transcript: array[int] = field(default_factory=lambda: array("I"))
    turns: list[TurnRecord] = field(default_factory=list)
    busy: bool = False
    abandoned: Callable[[], bool] = lambda: False  # whether the turn in flight has lost its reader
    line: list[Waiter] = field(default_factory=list)  # who has the next turns
    deleted: bool = False
    stored: int = 0  # how many of the first turns are in the store as they are here
    rebuild: RebuildReason | None = None  # why there is no cache, but a transcript
    epoch: int = 0  # how often what was kept of its cache became worthless

    cache: Cache | None = None
    lease: Lease | None = None
    parked: Tensor | None = None

    @property
    def pending(self) -> list[int]:
        """Committed tokens that the cache does not have yet."""
        cache = self.cache  # once: the engine thread may take it away meanwhile
        seen = cache.seen if cache is not None else 0
        return self.transcript[seen:].tolist()

    @property
    def segments(self) -> list[tuple[int, bool]]:
        """How the transcript came to the cache: where each prompt and each answer ended, and whether it was a
        prompt."""
        ends, start = [], 0
        for turn in self.turns:
            ends += [(start + turn.prompt_tokens, True), (turn.seen, False)]
            start += turn.tokens
        return ends

    def missing(self, seen: int) -> list[tuple[int, bool]]:
        """Of `segments` those that a cache lacks which has seen so many tokens, counted from there."""
        if self.turns and self.turns[-1].seen == seen:
            return []
        return [(end - seen, prompt) for end, prompt in self.segments if end > seen]

    @property
    def cached_turns(self) -> int:
        """How many of its first turns the committed cache has; 0 if it has none."""
        cache, count = self.cache, len(self.turns)
        while cache is not None and count and self.turns[count - 1].seen != cache.seen:
            count -= 1
        return 0 if cache is None else count

    def touch(self) -> None:
        """It was used now: a lifetime that counts from the last turn begins anew."""
        self.update_time = time.time()
        if self.ttl is not None:
            self.expire_time = self.update_time + self.ttl

    def expired(self, now: float) -> bool:
        """Whether its time is over; a turn in flight may still finish."""
        return now >= self.expire_time

    @property
    def tier(self) -> State:
        """Where its cache lies, whether a turn is in flight or not."""
        if self.cache is None:
            return State.STORED if self.turns else State.EMPTY
        return State.RESIDENT if self.lease is not None else State.PARKED

    def info(self) -> SessionInfo:
        """What can be said about it from outside."""
        cache = self.cache
        return SessionInfo(
            id=self.id,
            policy=str(self.policy),
            create_time=self.create_time,
            update_time=self.update_time,
            expire_time=self.expire_time,
            labels=dict(self.labels),
            state=State.BUSY if self.busy else self.tier,
            turn_count=len(self.turns),
            token_count=len(self.transcript),
            entries=cache.n if cache is not None else 0,
            bound=self.policy.bound,
            bytes=self.layout.bytes if self.lease is not None else 0,
        )
