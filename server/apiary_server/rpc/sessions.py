"""SessionService."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.empty_pb2 import Empty

from apiary.v1 import session_pb2 as pb
from apiary.v1.session_pb2_grpc import SessionServiceServicer
from apiary_server.errors import ReaderStalled
from apiary_server.rpc.caller import Context, caller
from apiary_server.rpc.convert import incoming, outgoing
from apiary_server.settings import Settings

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine

_Outcome = TypeVar("_Outcome")
_PORTING = 2  # sessions that are taken out or in at once: each is in memory, whole
_SLOWEST = 2**16  # bytes that a session must come in a second, at the least
_HEAD = 2**17  # bytes in which the length of a session is told


class SessionService(SessionServiceServicer):
    """Keeps sessions; each call sees its own tenant's only."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._porting = asyncio.Semaphore(_PORTING)

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        new = incoming.new_session(request)
        with incoming.below("session"):
            made = self._engine.keeper.create(
                tenant, new.id, new.policy, new.expire_time, new.ttl, new.labels or {}
            )
            return outgoing.session(await _whole(made))

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        return outgoing.session(self._engine.sessions.get(tenant, incoming.session_id(request.name, "name")))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        tenant = caller(context).tenant
        page, last = self._engine.sessions.list(tenant, *incoming.page(request))
        return outgoing.sessions(page, last)

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> Empty:
        tenant = caller(context).tenant
        await _whole(self._engine.keeper.delete(tenant, incoming.session_id(request.name, "name")))
        return Empty()

    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        id, change = incoming.change(request)
        with incoming.below("session"):
            return outgoing.session(await _whole(self._engine.keeper.update(tenant, id, change)))

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        id, new = incoming.fork(request)
        return outgoing.session(await _whole(self._engine.keeper.fork(tenant, id, new)))

    async def RewindSession(self, request: pb.RewindSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        id = incoming.session_id(request.name, "name")
        return outgoing.session(await _whole(self._engine.keeper.rewind(tenant, id, request.turn_count)))

    async def GetCacheMap(self, request: pb.GetCacheMapRequest, context: Context) -> pb.CacheMap:
        tenant = caller(context).tenant
        id, wanted = incoming.cache_map(request)
        copy = await _whole(self._engine.keeper.look(tenant, id))
        most = self._settings.max_message_bytes
        return await asyncio.to_thread(lambda: outgoing.cache_map(self._engine.cache_map(copy, wanted, most)))

    async def ExportSession(  # type: ignore[override]  # the stub knows generators alone
        self, request: pb.ExportSessionRequest, context: Context
    ) -> None:
        tenant = caller(context).tenant
        id = incoming.session_id(request.name, "name")
        async with self._carrying() as carry:
            parts = await carry(self._engine.porter.take_out(tenant, id))
            # written here, not yielded: whoever takes nothing would keep these bytes, and others waiting
            for message in outgoing.export(parts):
                await self._in_time(context.write(message), "nothing was taken")

    async def ImportSession(
        self, requests: AsyncIterator[pb.ImportSessionRequest], context: Context
    ) -> pb.Session:
        tenant = caller(context).tenant
        porter, data, length = self._engine.porter, bytearray(), None
        async with self._carrying() as carry:
            request = await self._in_time(anext(requests, None), "nothing came")
            id, began, looked = incoming.imported(request), time.monotonic(), 0
            while request is not None:
                data += request.chunk
                if length is None and len(data) >= 2 * looked:
                    length, looked = porter.length(bytes(data[:_HEAD])), len(data)
                if length is not None and len(data) > length:
                    break  # the others are not waited for: they are too many
                if time.monotonic() - began > self._settings.stall_limit + len(data) / _SLOWEST:
                    raise ReaderStalled(f"{len(data):,} bytes came in all this time: that is too slow")
                request = await self._in_time(anext(requests, None), "nothing came")
                incoming.imported_next(request)
            return outgoing.session(await carry(porter.take_in(tenant, id, bytes(data))))

    @asynccontextmanager
    async def _carrying(self) -> AsyncIterator[Callable[[Future[Any]], Awaitable[Any]]]:
        """Have one of the places for sessions that are taken out or in, until the caller is done and so is
        what was begun for him, though he may have left."""
        await self._porting.acquire()
        loop, begun = asyncio.get_running_loop(), list[Future[Any]]()

        def carry(work: Future[Any]) -> Awaitable[Any]:
            begun.append(work)
            return _whole(work)

        try:
            yield carry
        finally:
            if begun and not begun[0].done():
                begun[0].add_done_callback(lambda _: loop.call_soon_threadsafe(self._porting.release))
            else:
                self._porting.release()

    async def _in_time(self, step: Awaitable[_Outcome], what: str) -> _Outcome:
        """Wait no longer for the caller than for any slow reader."""
        try:
            return await asyncio.wait_for(step, self._settings.stall_limit)
        except TimeoutError:
            raise ReaderStalled(f"{what} for {self._settings.stall_limit:.0f} seconds") from None


async def _whole(change: Future[_Outcome]) -> _Outcome:
    """Wait for a change; a caller that leaves does not stop it half-way."""
    return await asyncio.shield(asyncio.wrap_future(change))
