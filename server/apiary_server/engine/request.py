"""What a caller asks of the engine. The limits of every field are declared here, once.

The models are validated by pydantic; `rpc/convert.py` builds them from protobuf and turns a
`ValidationError` into `InvalidField` with the protobuf path of each field. Limits that depend on the
served model or the settings (vocabulary, longest prompt, most tokens) are checked by `Engine.open`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Message(_Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Messages(_Record):
    """Chat messages, rendered with the model's template."""

    messages: tuple[Message, ...] = Field(min_length=1, max_length=1024)


class Text(_Record):
    """Plain text, tokenised without a template."""

    text: str = Field(min_length=1)


class TokenIds(_Record):
    """Token ids, taken as they are."""

    ids: tuple[TokenId, ...] = Field(min_length=1)


class Sampling(_Record):
    """How the next token is chosen. The defaults are greedy."""

    temperature: float = Field(0.0, ge=0, le=10)
    top_k: int = Field(0, ge=0, lt=2**31)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=0, lt=2**64)

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        neutral = self.repetition_penalty == 1 and not self.presence_penalty and not self.frequency_penalty
        return not neutral


class Stopping(_Record):
    """When the answer ends."""

    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: tuple[StopString, ...] = Field((), max_length=16)
    stop_token_ids: tuple[TokenId, ...] = Field((), max_length=64)
    ignore_eos: bool = False


class TurnRequest(_Record):
    """One turn: appended input, then generated output.

    `session` is the id behind `sessions/`, or None for a one-shot request; `policy` is a one-shot
    request's cache policy. `deadline` is in seconds of `time.monotonic()`. `trace` is carried to the
    turn's `TurnStats` untouched.
    """

    input: Messages | Text | TokenIds
    session: str | None = None
    tenant: str = Field("default", min_length=1, max_length=63)
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    logprobs: int | None = Field(None, ge=0, le=20)
    priority: int = Field(0, ge=-100, le=100)
    policy: str | None = Field(None, min_length=1, max_length=256)
    deadline: float | None = None
    trace: object = None
