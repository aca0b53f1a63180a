"""A session in a file of its own, to go to another worker: a snapshot with its settings and transcript."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from torch import Tensor

from apiary_server.sessions.request import Labels
from apiary_server.sessions.session import TurnRecord
from apiary_server.sessions.snapshot import Image, Manifest, Origin, corrupt, decode, encode
from apiary_server.sessions.store import StoredSession, StoredSettings, StoredTurn

_TRANSCRIPT, _RECORD = "transcript", "record"
_MOST_TURNS, _MOST_TOKENS, _MOST_RECORD = 100_000, 2**22, 2**25
_LONGEST = 100 * 365 * 86_400.0  # seconds that a worker's sessions may live, see `Settings.session_ttl`
_Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Turn(_Strict):
    """As `TurnRecord`."""

    prompt_tokens: int = Field(ge=1, lt=2**31)
    completion_tokens: _Count
    chat: bool
    seen: _Count
    finish: Literal["", "stop", "length", "cancelled"]
    seed: int = Field(ge=0, lt=2**64)
    cached_tokens: _Count
    evicted_entries: _Count
    tail: str = Field(max_length=4096)
    request_id: str | None = Field(min_length=1, max_length=128)
    digest: str = Field(max_length=64)


class _Record(_Strict):
    """A session but for its tokens."""

    ttl: float | None = Field(gt=0, le=_LONGEST)
    expire_time: float
    labels: Labels
    turns: Annotated[list[_Turn], FailFast(), Field(max_length=_MOST_TURNS)]


def pack(session: StoredSession, image: Image, origin: Origin) -> Sequence[bytes]:
    """The bytes of a session, in parts.

    Args:
        session: its settings and turns.
        image: its cache, if it has one.
        origin: the worker's.
    """
    record = _Record(
        ttl=session.settings.ttl,
        expire_time=session.settings.expire_time,
        labels=dict(session.settings.labels),
        turns=[_Turn(**asdict(turn.record)) for turn in session.turns],
    )
    tokens = array("I")
    for turn in session.turns:
        tokens.extend(turn.tokens)
    text = np.frombuffer(record.model_dump_json().encode(), np.uint8)
    more = {
        _TRANSCRIPT: torch.from_numpy(np.asarray(tokens, np.int32)),
        _RECORD: torch.from_numpy(text.copy()),
    }
    return encode(image, origin, more)


def unpack(
    data: bytes, tenant: str, id: str, origin: Origin, vocabulary: int
) -> tuple[StoredSession, Manifest, Mapping[str, Tensor]]:
    """Read what `pack` wrote, for a session of a tenant by another id.

    Returns:
        The session, and what its cache may be restored from.

    Raises:
        SnapshotRefused: these are not the bytes of a session, or not signed by the origin's key, or the
            session is of a model with another tokenizer, has tokens that its vocabulary has not, or has
            expired.
    """
    manifest, tensors = decode(data, origin)
    origin.check_tokenizer(manifest)
    text, tokens = tensors.pop(_RECORD, None), tensors.pop(_TRANSCRIPT, None)
    if text is None or tokens is None or text.dtype != torch.uint8 or tokens.dtype != torch.int32:
        raise corrupt("it has a cache alone, and no session")
    if len(text) > _MOST_RECORD or len(tokens) > _MOST_TOKENS:
        raise corrupt(f"{len(tokens):,} tokens, and {len(text):,} bytes of records, are too many")
    try:
        record = _Record.model_validate_json(text.numpy().tobytes())
    except ValidationError as error:
        raise corrupt(f"its record is malformed: {error.error_count()} faults") from error
    if len(tokens) and not 0 <= tokens.numpy().min() <= tokens.numpy().max() < vocabulary:
        raise corrupt(f"it has tokens beyond the vocabulary of {vocabulary:,}")
    transcript = array("I", tokens.numpy().tobytes())
    now = time.time()
    expire_time = record.expire_time if record.ttl is None else now + record.ttl
    if not 0 < expire_time - now <= _LONGEST:
        raise corrupt("its session has expired")
    settings = StoredSettings(manifest.policy, record.ttl, expire_time, record.labels, now, now)
    turns = _turns(record.turns, transcript)
    if manifest.turns > len(turns):
        raise corrupt(f"it is of {manifest.turns} turns, and has {len(turns)}")
    return StoredSession(tenant, id, settings, turns), manifest, tensors


def _turns(records: Sequence[_Turn], transcript: array[int]) -> Sequence[StoredTurn]:
    turns, start = [], 0
    for record in records:
        end = start + record.prompt_tokens + record.completion_tokens
        if not start + record.prompt_tokens <= record.seen <= end:
            raise corrupt(f"a cache that saw {record.seen} tokens is not one of a turn from {start} to {end}")
        turns.append(StoredTurn(TurnRecord(**record.model_dump()), transcript[start:end]))
        start = end
    if start != len(transcript):
        raise corrupt(f"its turns have {start} tokens, and its transcript {len(transcript)}")
    return turns
