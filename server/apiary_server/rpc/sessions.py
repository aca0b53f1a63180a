"""SessionService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from apiary.v1 import session_pb2 as pb
from apiary.v1.session_pb2_grpc import SessionServiceServicer
from apiary_server.errors import MethodNotImplemented
from apiary_server.rpc.caller import Context, caller
from apiary_server.rpc.convert import incoming, outgoing

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine


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
        freed = self._engine.delete_session(tenant, incoming.session_id(request.name, "name"))
        # shielded: a caller that leaves does not stop a deletion half-way
        await asyncio.shield(asyncio.wrap_future(freed))
        return Empty()

    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        id, change = incoming.change(request)
        with incoming.below("session"):
            updated = self._engine.update_session(tenant, id, change)
        # shielded: a caller that leaves does not stop a change half-way
        return outgoing.session(await asyncio.shield(asyncio.wrap_future(updated)))

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        id, new = incoming.fork(request)
        forked = self._engine.fork_session(tenant, id, new)
        # shielded: a caller that leaves does not stop a copy half-way
        return outgoing.session(await asyncio.shield(asyncio.wrap_future(forked)))

    async def RewindSession(self, request: pb.RewindSessionRequest, context: Context) -> pb.Session:
        tenant = caller(context).tenant
        id = incoming.session_id(request.name, "name")
        rewound = self._engine.rewind_session(tenant, id, request.turn_count)
        return outgoing.session(await asyncio.shield(asyncio.wrap_future(rewound)))

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


def _not_yet(method: str) -> MethodNotImplemented:
    return MethodNotImplemented(f"{method} is not implemented yet")
