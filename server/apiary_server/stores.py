"""Which stores a worker keeps its sessions and its snapshots in."""

from __future__ import annotations

from typing import NamedTuple

import structlog

from apiary_server.sessions.files import SnapshotFiles
from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import SnapshotStore, Store
from apiary_server.sessions.valkey.address import ValkeyAddress
from apiary_server.settings import Settings

_log = structlog.get_logger(__name__)


class Stores(NamedTuple):
    """Where sessions are kept, and where snapshots are; `place` says it without a password."""

    sessions: Store
    snapshots: SnapshotStore
    place: str


def open_stores(settings: Settings, tokenizer: str) -> Stores | None:
    """Open the stores that the settings name, if they name any.

    Args:
        settings: the worker's.
        tokenizer: a digest of the tokenizer.

    Raises:
        StoreError: they cannot be used.
        OSError: the password cannot be read.
    """
    if settings.durability == "off":
        if settings.state_dir is not None or settings.store is not None:
            _log.warning("durability is off: sessions end with the worker, and their place is not used")
        return None
    if settings.state_dir is not None:
        directory, snapshots = settings.state_dir, settings.state_dir / "snapshots"
        return Stores(SqliteStore(directory, tokenizer, snapshots), SnapshotFiles(snapshots), str(directory))
    if settings.store is not None:
        return _valkey(settings.store.get_secret_value(), settings, tokenizer)
    return None


def _valkey(url: str, settings: Settings, tokenizer: str) -> Stores:
    # here, since the client takes a fifth of a second to import, and most workers have no use for it
    from apiary_server.sessions.valkey.namespace import Namespace
    from apiary_server.sessions.valkey.sessions import ValkeySessions
    from apiary_server.sessions.valkey.snapshots import ValkeySnapshots

    address = ValkeyAddress.parse(url)
    if settings.store_password_file is not None:
        address = address.with_password(settings.store_password_file.read_text().strip())
    namespace = Namespace(address, tokenizer)
    return Stores(ValkeySessions(namespace), ValkeySnapshots(namespace), address.shown)
