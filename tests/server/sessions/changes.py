"""Sessions to store."""

from __future__ import annotations

from array import array

from apiary_server.sessions.session import TurnRecord
from apiary_server.sessions.store import Change, StoredSettings, StoredTurn

SETTINGS = StoredSettings("buzz2", None, 2e9, {"team": "bees \u2620"}, 1e9, 1.5e9 + 1 / 3)


def turn(number: int, tokens: int = 5) -> StoredTurn:
    record = TurnRecord(
        tokens - 2, 2, chat=True, seen=tokens, finish="stop", seed=2**64 - 1, tail="\n\u2620", request_id="x"
    )
    return StoredTurn(record, array("I", range(number, number + tokens)))


def change(id: str, kept: int = 0, *turns: StoredTurn, tenant: str = "default") -> Change:
    return Change(tenant, id, SETTINGS, kept, turns)
