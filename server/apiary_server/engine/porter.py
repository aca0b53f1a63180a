"""Takes sessions out to other workers, and in from them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from apiary_server.engine.keeper import Keeper
from apiary_server.engine.restorer import Restorer
from apiary_server.errors import Draining, SessionNotFound, SnapshotRefused
from apiary_server.sessions.info import RebuildReason, SessionInfo
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.portable import pack, unpack
from apiary_server.sessions.restored import Restored, restore
from apiary_server.sessions.session import Session
from apiary_server.sessions.snapshot import Manifest, Origin, corrupt, length
from buzz import Rotary

_Outcome = TypeVar("_Outcome")
_MOST_BESIDE = 48 * 2**20  # bytes of a session beside its cache: transcript and records
_PATIENCE = 60.0  # seconds that the engine thread and the journal may take


class Porter:
    """Exports and imports sessions, one after the other, in a thread of its own. All methods may be called
    from any thread.

    Args:
        keeper: what copies them between their turns.
        sessions: the table of sessions.
        restorer: what brings their caches.
        origin: whose caches this worker can use.
        rotary: the model's.
        vocabulary: how many tokens the model has.
    """

    def __init__(
        self,
        keeper: Keeper,
        sessions: SessionManager,
        restorer: Restorer,
        origin: Origin,
        rotary: Rotary,
        vocabulary: int,
    ) -> None:
        self._keeper = keeper
        self._sessions = sessions
        self._restorer = restorer
        self._origin = origin
        self._rotary = rotary
        self._vocabulary = vocabulary
        self._thread = ThreadPoolExecutor(1, "porter")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def take_out(self, tenant: str, id: str) -> Future[Sequence[bytes]]:
        """A session as it is, as bytes in parts.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        copied = self._keeper.copy(tenant, id)
        return self._submit(lambda: pack(*copied.result(_PATIENCE), self._origin))

    def length(self, start: bytes) -> int | None:
        """How many bytes a session has that begins with these; None if they are too few to tell.

        Raises:
            SnapshotRefused: they are not the first bytes of a session, or it is too large.
            InvalidField: this worker cannot serve its policy.
        """
        found = length(start, self._origin)
        if found is None:
            return None
        manifest, size = found
        most = self._sessions.slot_bytes(manifest.policy) + _MOST_BESIDE
        if size > most:
            raise corrupt(f"it has {size:,} bytes, and {most:,} are the most")
        return size

    def take_in(self, tenant: str, id: str | None, data: bytes) -> Future[SessionInfo]:
        """Add a session from its bytes.

        Args:
            tenant: whose it will be.
            id: by which; None draws one.
            data: what `take_out` returned.

        Returns:
            The session, when it is stored; or SnapshotRefused, InvalidField, SessionExists, BudgetExhausted.
        """
        return self._submit(lambda: self._take_in(tenant, id or secrets.token_hex(8), data))

    def _submit(self, work: Callable[[], _Outcome]) -> Future[_Outcome]:
        try:
            return self._thread.submit(work)
        except RuntimeError:  # closed
            raise Draining from None

    def _take_in(self, tenant: str, id: str, data: bytes) -> SessionInfo:
        stored, manifest, tensors = unpack(data, tenant, id, self._origin, self._vocabulary)
        session = self._sessions.build(stored)
        found, why = self._restored(session, manifest, tensors)
        self._sessions.adopt(session)
        try:
            self._restorer.place(session, found, why).result(_PATIENCE)
        except BaseException:
            with contextlib.suppress(SessionNotFound):
                if not session.deleted:  # else it may be another that has its name now
                    self._keeper.delete(tenant, id)
            raise
        finally:
            self._sessions.end_turn(session)
        self._sessions.changed(session)  # it has a cache now
        return self._keeper.stored(session).result(_PATIENCE)

    def _restored(
        self, session: Session, manifest: Manifest, tensors: Mapping[str, Tensor]
    ) -> tuple[Restored | None, RebuildReason | None]:
        """The session's cache, or why it has to be computed anew."""
        if manifest.counts is None or not manifest.turns:
            return None, session.rebuild
        why = None if manifest.turns == len(session.turns) else session.rebuild
        try:
            self._origin.check(manifest)
            return restore(session, manifest.turns, manifest, tensors, self._rotary), why
        except SnapshotRefused as error:
            if error.reason is RebuildReason.MODEL_CHANGED:
                return None, error.reason
            raise
