"""What the model layer takes and gives: input, sampling parameters (with their limits), log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from apiary_server.limits import sized

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Record(BaseModel):
    """Base of what a request consists of: immutable, and strict about types, names and numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Message(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Messages(Record):
    """Chat messages, rendered with the model's template."""

    messages: Annotated[tuple[Message, ...], sized(1, 1024)]


class Text(Record):
    """Plain text, tokenised without a template."""

    text: str = Field(min_length=1)


class TokenIds(Record):
    """Token ids, taken as they are; of bad ones the first is named."""

    ids: Annotated[tuple[TokenId, ...], FailFast(), sized(1, 2**31)]


class Sampling(Record):
    """How the next token is chosen. The defaults are greedy."""

    temperature: float = Field(0.0, ge=0, le=10)
    top_k: int = Field(0, ge=0, lt=2**31)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], sized(0, 1024)] = {}
    seed: int | None = Field(None, ge=0, lt=2**64)

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        neutral = self.repetition_penalty == 1 and not self.presence_penalty and not self.frequency_penalty
        return not neutral


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution, and its likeliest rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
