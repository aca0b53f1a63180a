"""A step as plain data: what the scheduler decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from apiary_server.engine.costs import Work

if TYPE_CHECKING:
    from apiary_server.engine.turn import Turn


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One turn's share of a step: the tokens `[turn.computed, turn.computed + count)`."""

    turn: Turn
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step yields the turn's next token: it computes the last that is known."""
        return not self.turn.replaying and self.turn.computed + self.count == len(self.turn.tokens)


@dataclass(slots=True)
class StepPlan:
    """One forward pass over a ragged batch: decode tokens first, then prefill chunks.

    `work` is what all of it costs; `blocked` is the turn for which there was no memory, and behind which the
    others wait.
    """

    chunks: list[ScheduledChunk] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    blocked: Turn | None = None

    @property
    def decode_tokens(self) -> int:
        """Tokens that were generated and are fed back."""
        return self.work.rows

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts."""
        return self.work.tokens
