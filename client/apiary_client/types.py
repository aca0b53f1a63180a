"""What the client takes and gives: plain immutable data, without protobuf. Times in seconds unless said."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias, TypedDict

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. A system message may only open a session."""

    role: Role
    content: str


Chat: TypeAlias = str | Message | Sequence[Message]
"""Chat messages; a bare string is one message of the user."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. None is the API's default; the defaults are greedy."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When the answer ends, besides the model's own end-of-turn token. None means the server's default.

    `stop` is one stop string or several.
    """

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None


class OnCancel(enum.StrEnum):
    """What a cancelled turn leaves behind."""

    DISCARD = "discard"
    KEEP = "keep"


class WhenBusy(enum.StrEnum):
    """What happens when the session already has a turn in flight."""

    REJECT = "reject"
    WAIT = "wait"


class TurnOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; an absent one leaves the server's default."""

    text: str | None
    """Plain text in place of messages, tokenised without a chat template."""
    token_ids: Sequence[int] | None
    """Token ids in place of messages, taken as they are."""
    session: Session | str | None
    """The session that the turn belongs to; None leaves nothing behind."""
    sampling: Sampling | None
    """How tokens are chosen."""
    stopping: Stopping | None
    """When the answer ends."""
    policy: str | None
    """Cache policy of a request without a session, e.g. `buzz(window=300)`."""
    logprobs: int | None
    """Return each token's log-probability and this many alternatives, at most 20."""
    priority: int
    """Higher goes first among the requests of one tenant, -100 to 100."""
    request_id: str | None
    """Makes a turn of a session idempotent: the same request again gets the same answer, and a turn that
    still runs goes on for the newest call."""
    next_index: int
    """With a `request_id` that was used before: the number of the answer's tokens that came. What comes says
    by its `index` whether it goes on from there, or begins anew at 0 since that turn was rolled back."""
    on_cancel: OnCancel | None
    """What a cancel leaves behind."""
    when_busy: WhenBusy | None
    """What happens when the session is busy."""


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """A reason that is newer than this client."""


class RebuildReason(enum.StrEnum):
    """Why a session's cache was rebuilt from its transcript."""

    SNAPSHOT_CORRUPT = "snapshot_corrupt"
    MODEL_CHANGED = "model_changed"
    POLICY_CHANGED = "policy_changed"
    REWOUND = "rewound"
    RESTARTED = "restarted"
    SNAPSHOT_EVICTED = "snapshot_evicted"
    UNKNOWN = "unknown"
    """A reason that is newer than this client."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative at one place."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution; `top` has the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost."""

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
    """Whether the turn is on the worker's disk."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer; `finish_reason` and `usage` are set in the last one only.

    `index` is the place of the first of `token_ids` in the answer, from 0.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer, or what is left of it from the token `index` on: that is `next_index` of the request,
    or 0 where the answer had to be computed anew."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
    index: int = 0


class State(enum.StrEnum):
    """Where a session's cache lies."""

    EMPTY = "empty"
    RESIDENT = "resident"
    PARKED = "parked"
    BUSY = "busy"
    STORED = "stored"
    UNKNOWN = "unknown"
    """A state that is newer than this client."""


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """What a session's cache holds: entries of each layer and KV head, their bound at rest, leased bytes."""

    entries: int
    bound: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation as it was when asked. `name` is `sessions/{id}`; times are in UTC."""

    name: str
    policy: str
    state: State
    turn_count: int
    token_count: int
    cache: CacheUsage
    labels: Mapping[str, str]
    create_time: datetime | None
    update_time: datetime | None
    expire_time: datetime | None

    @property
    def id(self) -> str:
        """The name without `sessions/`."""
        return self.name.removeprefix("sessions/")


@dataclass(frozen=True, slots=True)
class Model:
    """A served model and its limits; the fields of `apiary.v1.Model`."""

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
class Chunk:
    """Some bytes of a session that is streamed out; `total_bytes` is 0 but in the first."""

    data: bytes
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Capacity:
    """Budgets of a worker and what is in use; the fields of `apiary.v1.Capacity`."""

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
