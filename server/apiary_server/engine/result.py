"""What the engine answers: deltas, the end of a turn, and plain numbers for telemetry."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from apiary_server.model.types import TokenLogprob as TokenLogprob
from apiary_server.sessions.info import RebuildReason


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost. Times in seconds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    evicted_entries: int
    queue_time: float
    prefill_time: float
    decode_time: float
    seed: int
    rebuild_reason: RebuildReason | None = None
    durable: bool = False


@dataclass(slots=True)
class Delta:
    """A piece of an answer; `finish_reason` and `usage` are set in the last one only."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    index: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def merge(self, later: Delta) -> None:
        """Take in the delta that follows this one (for a reader that is behind)."""
        if not self.token_ids:
            self.index = later.index
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.usage = later.usage


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model and its limits."""

    name: str
    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    weight_dtype: str
    cache_dtype: str
    default_policy: str
    default_max_tokens: int
    max_tokens: int
    max_prompt_tokens: int
    eos_token_ids: tuple[int, ...]
    chat: bool


@dataclass(frozen=True, slots=True)
class Capacity:
    """Budgets and what is in use; all bytes exact. Same fields as `apiary.v1.Capacity`."""

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    workspace_bytes: int
    workspaces: int
    slot_bytes: int
    reserve_slots: int
    max_resident_sessions: int
    resident_sessions: int
    parked_sessions: int
    parked_bytes: int
    parked_budget_bytes: int
    sessions: int
    running_turns: int
    queued_turns: int
    queue_limit: int
    store_degraded: bool = False
    stored_sessions: int = 0
    stored_bytes: int = 0
    stored_budget_bytes: int = 0
    unread_sessions: int = 0
    store_error: str = ""


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine loop, for telemetry. Seconds, bytes, counts."""

    duration: float
    prefill_tokens: int
    decode_tokens: int
    compactions: int
    evicted_entries: int
    running_turns: int
    queued_turns: int
    used_bytes: int
    parked_bytes: int
    resident_sessions: int
    sessions: int


@dataclass(frozen=True, slots=True)
class TurnStats:
    """One ended turn, for telemetry. Times in seconds of `time.monotonic()`; None where not reached."""

    tenant: str
    session: str | None
    outcome: str  # a finish reason, or the error's class name
    arrived: float
    started: float | None
    first_token: float | None
    ended: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    evicted_entries: int
    trace: object


class Observer:
    """Receives the engine's plain numbers, on the engine thread; must not block."""

    def step(self, stats: StepStats) -> None:
        """A step ended."""

    def turn(self, stats: TurnStats) -> None:
        """A turn ended, in whatever way."""
