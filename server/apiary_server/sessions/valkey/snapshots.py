"""Snapshots in a namespace of a Valkey server."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from apiary_server.sessions.valkey.namespace import Namespace

_ABANDONED = 600  # seconds after which a snapshot that was never finished is gone
# KEYS: about, lease, snapshots, the snapshot, incoming. ARGV: owner, lease, its name, its bytes.
_WRITE = """
redis.call('RENAME', KEYS[5], KEYS[4])
redis.call('PERSIST', KEYS[4])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
"""
_DELETE = """
redis.call('UNLINK', KEYS[4])
redis.call('HDEL', KEYS[3], ARGV[3])
"""


class ValkeySnapshots:
    """As `SnapshotStore`. A snapshot goes to a key of this owner's first, so that the script that gives it
    its name is short. The most bytes are the server's `proto-max-bulk-len`.

    Args:
        namespace: where; this process's.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._writing = threading.Lock()
        self._names = namespace.key("snapshots")
        namespace.join()

    def names(self) -> Mapping[str, int]:
        """As `SnapshotStore.names`."""
        (sizes,) = self._namespace.server.ask(("HGETALL", self._names))
        return {name.decode(): int(size) for name, size in sizes.items()}

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        """As `SnapshotStore.write`."""
        data = b"".join(parts)
        with self._writing:
            incoming = self._namespace.key("incoming", self._namespace.owner)
            # an older one must not take the name where this one is refused
            before = [("DEL", incoming), ("SET", incoming, data, "EX", _ABANDONED)]
            keys = (self._names, self._key(name), incoming)
            self._namespace.write(_WRITE, keys, (name, len(data)), before=before, large=True)

    def read(self, name: str, most: int) -> bytes | None:
        """As `SnapshotStore.read`."""
        key = self._key(name)
        data, there = self._namespace.server.ask(("GETRANGE", key, 0, most - 1), ("EXISTS", key))
        return data if data or there else None

    def delete(self, name: str) -> None:
        """As `SnapshotStore.delete`."""
        self._namespace.write(_DELETE, (self._names, self._key(name)), (name,), durable=False)

    def close(self) -> None:
        """As `SnapshotStore.close`."""
        self._namespace.leave()

    def _key(self, name: str) -> str:
        return self._namespace.key("snapshot", name)
