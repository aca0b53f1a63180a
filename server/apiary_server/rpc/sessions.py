"""SessionService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.empty_pb2 import Empty

from apiary.v1 import session_pb2 as pb
from apiary.v1.session_pb2_grpc import SessionServiceServicer
from apiary_server.errors import MethodNotImplemented
from apiary_server.rpc.caller import Context, caller
from apiary_server.rpc.convert import incoming, outgoing

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine

_Outcome = TypeVar("_Outcome")


class SessionService(SessionServiceServicer):
    """Keeps sessions; each call sees its own tenant's only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        new = incoming.new_session(request)
        with incoming.below("session"):
            info = self._engine.sessions.create(
                tenant, new.id, new.policy, new.expire_time, new.ttl, new.labels or {}
            )
        return outgoing.session(info)

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
        raise _not_yet("GetCacheMap")

    async def ExportSession(
        self, request: pb.ExportSessionRequest, context: Context
    ) -> AsyncIterator[pb.ExportSessionResponse]:
        raise _not_yet("ExportSession")
        yield  # makes it a generator, as its like will be

    async def ImportSession(
        self, request: AsyncIterator[pb.ImportSessionRequest], context: Context
    ) -> pb.Session:
        raise _not_yet("ImportSession")


async def _whole(change: Future[_Outcome]) -> _Outcome:
    """Wait for a change; a caller that leaves does not stop it half-way."""
    return await asyncio.shield(asyncio.wrap_future(change))


def _not_yet(method: str) -> MethodNotImplemented:
    return MethodNotImplemented(f"{method} is not implemented yet")
