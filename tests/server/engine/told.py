"""What is known of sessions from what was asked and answered: the simple model of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from apiary_server.engine.result import Usage
from apiary_server.sessions.info import RebuildReason
from tests.server.driver import Reader

Reasons = frozenset[RebuildReason | None]
NOTHING: Reasons = frozenset({None})


@dataclass
class Told:
    """A session.

    Attributes:
        policy: its.
        turns: the tokens of each.
        durable: how many of the turns outlive a crash.
        reasons: what its next turn may say of its cache: None if nothing has to be computed anew.
    """

    policy: str
    turns: list[list[int]] = field(default_factory=list)
    durable: int = 0
    reasons: Reasons = NOTHING

    @property
    def transcript(self) -> list[int]:
        """All its tokens."""
        return [token for turn in self.turns for token in turn]

    def is_full(self, tokens: int) -> bool:
        """Whether its cache evicts nothing, and does not hold so many more."""
        bound = re.match(r"full\(bound=(\d+)", self.policy)
        return bound is not None and len(self.transcript) + tokens > int(bound[1])

    def commit(self, tokens: list[int], *, durable: bool) -> None:
        """It has another turn, which was stored, and all before with it; or perhaps it was not."""
        self.turns.append(tokens)
        self.durable, self.reasons = len(self.turns) if durable else self.durable, NOTHING

    def change(self, policy: str) -> None:
        """It has another policy, and that is stored."""
        self.durable = len(self.turns)
        if policy != self.policy and self.turns:
            self.reasons = frozenset({RebuildReason.POLICY_CHANGED})
        self.policy = policy

    def cut(self, turns: int, reasons: Collection[RebuildReason | None]) -> None:
        """It has its first turns alone, and that is stored; its cache may be lost for these reasons."""
        if turns < len(self.turns):
            self.reasons = frozenset(reasons)
        del self.turns[turns:]
        self.durable = turns
        if not turns:
            self.reasons = NOTHING

    def fork(self) -> Told:
        """Another one that is as this; both are stored."""
        self.durable = len(self.turns)
        return dataclasses.replace(self, turns=list(self.turns))


@dataclass
class Asked:
    """A turn in flight.

    Attributes:
        id: of the session.
        prompt: its.
        max_tokens: the most that it answers.
        keep: whether its answer is kept as far as it was read.
        reader: reads the answer.
        queued: done when the turn is in the queue, or refused.
        before: the session's state before it, if that is known.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    keep: bool
    reader: Reader
    queued: Future[None]
    before: dict[str, Any] | None

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.reader.ended or (self.queued.done() and self.queued.exception() is not None)

    @property
    def error(self) -> BaseException | None:
        """What ended it before its time, once it is over."""
        return self.reader.error or (None if self.reader.ended else self.queued.exception())

    @property
    def usage(self) -> Usage | None:
        """What it cost, once it is over; None if it was cut short."""
        return self.reader.usage if self.error is None else None
