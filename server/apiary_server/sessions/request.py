"""What a caller may ask of a new session. The limits of every field are declared here, once."""

from __future__ import annotations

import time
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from apiary_server.limits import sized

LONGEST_LIFE = 10 * 365 * 86_400.0  # seconds
SESSION_ID = r"^[a-z0-9][a-z0-9._-]{0,62}$"

SessionId = Annotated[str, Field(pattern=SESSION_ID)]
LabelKey = Annotated[str, Field(min_length=1, max_length=63)]
LabelValue = Annotated[str, Field(max_length=256)]
Labels = Annotated[dict[LabelKey, LabelValue], sized(0, 64)]


class SessionChange(BaseModel):
    """What is to be changed of a session; None stays as it is.

    `expire_time` is wall-clock, in seconds since 1970; `ttl` is in seconds, from now and after each turn;
    at most one of them is given. `labels` replace all that there were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    policy: str | None = Field(None, min_length=1, max_length=256)
    expire_time: float | None = None
    ttl: float | None = Field(None, gt=0, le=LONGEST_LIFE)
    labels: Labels | None = None

    @field_validator("expire_time")
    @classmethod
    def _ahead(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value - time.time() <= LONGEST_LIFE:
            raise ValueError("must be in the future, at most 10 years ahead")
        return value


class NewSession(SessionChange):
    """A session to create: `id` is drawn by the server if None, and what is None is the server's default."""

    id: SessionId | None = None
