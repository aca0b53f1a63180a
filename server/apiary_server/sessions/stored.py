"""Sessions as stores keep them, and back."""

from __future__ import annotations

import sys
from array import array

from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import SlotLayout
from apiary_server.sessions.session import Session
from apiary_server.sessions.store import Change, StoredSession, StoredSettings, StoredTurn
from buzz import Policy


def change_of(session: Session) -> Change:
    """What the store lacks of a session, which counts as stored now."""
    if session.deleted:
        return Change(session.tenant, session.id, None)
    kept, session.stored = session.stored, len(session.turns)
    return Change(session.tenant, session.id, _settings(session), kept, _turns(session, kept))


def stored_of(session: Session) -> StoredSession:
    """A session as a store would keep it."""
    return StoredSession(session.tenant, session.id, _settings(session), _turns(session))


def session_of(stored: StoredSession, policy: Policy, layout: SlotLayout, rebuild: RebuildReason) -> Session:
    """A session without a cache; `rebuild` says why, if it had one."""
    settings, transcript = stored.settings, array("I")
    for turn in stored.turns:
        transcript.extend(turn.tokens)
    return Session(
        id=stored.id,
        tenant=stored.tenant,
        policy=policy,
        layout=layout,
        ttl=settings.ttl,
        expire_time=settings.expire_time,
        labels=settings.labels,
        create_time=settings.create_time,
        update_time=settings.update_time,
        transcript=transcript,
        turns=[turn.record for turn in stored.turns],
        stored=len(stored.turns),
        rebuild=rebuild if stored.turns else None,
    )


def _settings(session: Session) -> StoredSettings:
    return StoredSettings(
        policy=str(session.policy),
        ttl=session.ttl,
        expire_time=session.expire_time,
        labels=session.labels,
        create_time=session.create_time,
        update_time=session.update_time,
    )


def _turns(session: Session, first: int = 0) -> list[StoredTurn]:
    records = session.turns[first:]
    start, turns = len(session.transcript) - sum(each.tokens for each in records), []
    for record in records:
        end = start + record.tokens
        turns.append(StoredTurn(record, session.transcript[start:end]))
        start = end
    return turns


def pack(tokens: array[int]) -> bytes:
    """Tokens as 32-bit integers, little-endian."""
    return _little_endian(tokens).tobytes()


def unpack(data: bytes) -> array[int]:
    """Tokens that were packed.

    Raises:
        ValueError: the bytes are no multiple of four.
    """
    return _little_endian(array("I", data))


def _little_endian(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens
