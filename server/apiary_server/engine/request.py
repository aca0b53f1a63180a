"""What a caller asks of the engine. Limits of fields are declared once, here or in `model/types.py`.

The models are validated by pydantic; `rpc/convert` builds them from protobuf and turns a
`ValidationError` into `InvalidField` with the protobuf path of each field. Limits that depend on the
served model or the settings (vocabulary, longest prompt, most tokens) are checked by `engine/door.py`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field, field_validator

from apiary_server.limits import sized
from apiary_server.model.types import Message, Messages, Record, Sampling, Text, TokenId, TokenIds

__all__ = [
    "CacheMapRequest",
    "Message",
    "Messages",
    "Sampling",
    "Stopping",
    "Tenant",
    "Text",
    "TokenIds",
    "TurnRequest",
]

MOST_LAYERS = 1024  # that a request may name
TENANT = r"^[A-Za-z0-9._-]{1,63}$"

Tenant = Annotated[str, Field(pattern=TENANT)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Stopping(Record):
    """When the answer ends."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: Annotated[tuple[StopString, ...], sized(0, 16)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], sized(0, 64)] = ()
    ignore_eos: bool = False


class TurnRequest(Record):
    """One turn: appended input, then generated output.

    `session` is the id behind `sessions/`, or None for a one-shot request; `policy` is a one-shot
    request's cache policy. `deadline` is in seconds of `time.monotonic()`. `request_id` makes a turn of a
    session idempotent: the same request again gets the same answer, from its token `next_index` on. `keep`:
    where the turn is cut short, what its reader has taken stays as the answer. `wait`: for the turn of the
    session that is in flight. `trace` is carried to the turn's `TurnStats` untouched.
    """

    input: Messages | Text | TokenIds
    session: str | None = None
    tenant: Tenant = "default"
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    logprobs: int | None = Field(None, ge=0, le=20)
    priority: int = Field(0, ge=-100, le=100)
    policy: str | None = Field(None, min_length=1, max_length=256)
    deadline: float | None = None
    request_id: str | None = Field(None, min_length=1, max_length=128)
    next_index: int = Field(0, ge=0)
    keep: bool = False
    wait: bool = False
    trace: object = None

    @property
    def digest(self) -> str:
        """Tells requests for different answers apart."""
        asked = self.model_dump_json(include={"input", "sampling", "stopping", "logprobs"})
        return hashlib.sha256(asked.encode()).hexdigest()


class CacheMapRequest(Record):
    """What to tell of a cache: `full` is every entry, of these `layers` (none: all). The transcript is cut
    into at most `column_count` pieces, in which entries are counted. A summary has at most `token_limit`
    tokens."""

    full: bool = False
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), max_length=MOST_LAYERS)
    column_count: int = Field(64, ge=1, le=512)
    token_limit: int = Field(50, ge=1, le=1000)

    @field_validator("layers")
    @classmethod
    def _once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a layer twice")
        return value
