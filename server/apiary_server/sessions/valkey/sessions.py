"""Sessions in a namespace of a Valkey server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from apiary_server.sessions.session import TurnRecord
from apiary_server.sessions.store import Change, StoredSession, StoredSettings, StoredTurn, StoreForgot
from apiary_server.sessions.stored import pack, unpack
from apiary_server.sessions.valkey.namespace import Namespace

_PAGE = 100  # sessions that are read together; a write of more is a large one
# KEYS: about, lease, sessions, then the turns' of each change. ARGV: owner, lease, then of each change: its
# session, the settings ("": it is deleted), how many turns are kept, how many follow, and those. Nothing is
# changed if turns are missing, or if the server is full: it refuses a script's first write, here the lease.
_WRITE = """
local grows, at, lengths = false, 3, {}
for place = 4, #KEYS do
  local key, kept, count = KEYS[place], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  if kept > (lengths[key] or redis.call('LLEN', key)) then
    return redis.error_reply('FORGOT ' .. key)
  end
  lengths[key] = kept + count
  grows = grows or ARGV[at + 1] ~= ''
  at = at + 4 + count
end
if grows then redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2]) end
at = 3
for place = 4, #KEYS do
  local key, session, settings = KEYS[place], ARGV[at], ARGV[at + 1]
  local kept, count = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  if kept == 0 then redis.call('DEL', key) else redis.call('LTRIM', key, 0, kept - 1) end
  if settings == '' then redis.call('HDEL', KEYS[3], session)
  else redis.call('HSET', KEYS[3], session, settings) end
  for turn = at + 4, at + 3 + count do redis.call('RPUSH', key, ARGV[turn]) end
  at = at + 4 + count
end
"""


class ValkeySessions:
    """As `Store`.

    Args:
        namespace: where; this process's.

    Attributes:
        unread: none: a session that cannot be read keeps the worker from starting.
    """

    unread = 0

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._owner = namespace.owner
        namespace.join()

    def load(self) -> Iterator[StoredSession]:
        """As `Store.load`."""
        sessions = self._namespace.key("sessions")
        (names,) = self._namespace.server.ask(("HKEYS", sessions))
        for start in range(0, len(names), _PAGE):
            page = [name.decode() for name in names[start : start + _PAGE]]
            turns = [("LRANGE", self._turns(name), 0, -1) for name in page]
            settings, *lists = self._namespace.server.ask(("HMGET", sessions, *page), *turns)
            for name, about, stored in zip(page, settings, lists, strict=True):
                yield self._session(name, about, stored)

    def write(self, changes: Sequence[Change]) -> None:
        """As `Store.write`.

        Raises:
            StoreForgot: the server has lost what it had: all of every session is to be written.
            StoreError: as there; or the connection broke, and nobody knows.
        """
        if self._owner != self._namespace.owner:  # a snapshot, or the lease, has found that out
            self._owner = self._namespace.owner
            raise StoreForgot("the store had lost what it had; what is in memory is stored anew")
        keys, arguments = [self._namespace.key("sessions")], list[str | bytes | int]()
        for change in changes:
            name = f"{change.tenant}/{change.id}"
            keys.append(self._turns(name))
            try:
                turns = [_turn_text(turn) for turn in change.turns]
                settings = "" if change.settings is None else _settings_text(change.settings)
            except (TypeError, ValueError) as error:
                raise self._namespace.server.error(f"{name} cannot be written as JSON: {error}") from error
            arguments += [name, settings, change.kept, len(turns), *turns]
        try:
            self._namespace.write(_WRITE, keys, arguments, large=len(changes) > _PAGE)
        except StoreForgot:
            self._owner = self._namespace.owner
            raise

    def close(self) -> None:
        """As `Store.close`."""
        self._namespace.leave()

    def _turns(self, name: str) -> str:
        return self._namespace.key("turns", name)

    def _session(self, name: str, settings: bytes, turns: Sequence[bytes]) -> StoredSession:
        tenant, _, id = name.partition("/")
        try:
            return StoredSession(
                tenant, id, StoredSettings(**json.loads(settings)), [_turn_of(text) for text in turns]
            )
        except (ValueError, TypeError) as error:
            raise self._namespace.server.error(
                f"what is stored of {name} cannot be read ({error}): restore it, or delete its keys, or name "
                "another namespace"
            ) from error


def _settings_text(settings: StoredSettings) -> str:
    return json.dumps(asdict(settings) | {"labels": dict(settings.labels)})


def _turn_text(turn: StoredTurn) -> bytes:
    return json.dumps(asdict(turn.record)).encode() + b"\n" + pack(turn.tokens)


def _turn_of(text: bytes) -> StoredTurn:
    record, _, tokens = text.partition(b"\n")
    return StoredTurn(TurnRecord(**json.loads(record)), unpack(tokens))
