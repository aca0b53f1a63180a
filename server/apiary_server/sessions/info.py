"""What can be said about a session from outside: plain data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class State(enum.Enum):
    """Where a session's cache lies."""

    EMPTY = "empty"
    STORED = "stored"
    RESIDENT = "resident"
    PARKED = "parked"
    BUSY = "busy"


class RebuildReason(enum.Enum):
    """Why a session's cache has to be computed again from its transcript."""

    SNAPSHOT_CORRUPT = "snapshot corrupt"
    MODEL_CHANGED = "model changed"
    POLICY_CHANGED = "policy changed"
    REWOUND = "rewound"
    RESTARTED = "restarted"
    SNAPSHOT_EVICTED = "snapshot evicted"


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session as it is now. Times are wall-clock, in seconds since 1970; `bytes` are leased bytes."""

    id: str
    policy: str
    create_time: float
    update_time: float
    expire_time: float
    labels: Mapping[str, str]
    state: State
    turn_count: int
    token_count: int
    entries: int
    bound: int
    bytes: int
