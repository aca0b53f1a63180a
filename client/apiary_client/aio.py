"""The asyncio client: `apiary_client.Client` with `await`."""

# ruff: noqa: ASYNC109 - a timeout is the call's deadline, which travels to the worker

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from apiary.v1 import generation_pb2 as generation_pb
from apiary.v1 import model_pb2 as model_pb
from apiary.v1 import session_pb2 as session_pb
from apiary.v1.generation_pb2_grpc import GenerationServiceStub
from apiary.v1.model_pb2_grpc import ModelServiceStub
from apiary.v1.session_pb2_grpc import SessionServiceStub
from apiary_client import channel, convert, errors
from apiary_client.cache_map import CacheMap
from apiary_client.types import Capacity, Chat, Chunk, Completion, Delta, Model, Session, TurnOptions

Request = TypeVar("Request")
Response = TypeVar("Response")


class Client:
    """Talks to one worker, or to a router before many; to be made and used within one event loop.

    Arguments, timeouts, retries and errors are those of `apiary_client.Client`. Cancelling the task that
    awaits a call cancels the call.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        tenant: str | None = None,
        tls: channel.TLS | None = None,
        max_message_bytes: int = channel.MAX_MESSAGE_BYTES,
    ) -> None:
        self._tenant = channel.check_tenant(tenant)
        options = channel.options(max_message_bytes)
        self._channel = (
            grpc.aio.secure_channel(target, tls.credentials(), options)
            if tls
            else grpc.aio.insecure_channel(target, options)
        )
        self._generation = GenerationServiceStub(self._channel)
        self._sessions = SessionServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()

    async def generate(
        self, messages: Chat | None = None, *, timeout: float | None = None, **options: Unpack[TurnOptions]
    ) -> Completion:
        """Run one turn and return the whole answer."""
        request = convert.generate_request(messages, **options)
        return convert.completion(
            await self._call(self._generation.Generate, request, timeout, request.session)
        )

    def stream(
        self, messages: Chat | None = None, *, timeout: float | None = None, **options: Unpack[TurnOptions]
    ) -> AsyncGenerator[Delta]:
        """Run one turn and iterate over the pieces of its answer.

        The call starts with the first piece. `aclose()` on the iterator cancels it at once; after a plain
        `break` out of the loop, asyncio does so when it next runs.
        """
        return self._stream(convert.generate_request(messages, **options), timeout)

    async def tokenize(
        self, messages: Chat | None = None, *, text: str | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Return the token ids of chat messages, as a first turn would see them, or of plain `text`."""
        request = convert.tokenize_request(messages, text)
        return tuple((await self._call(self._generation.Tokenize, request, timeout)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """Return the text of token ids."""
        request = generation_pb.DetokenizeRequest(token_ids=token_ids)
        return (await self._call(self._generation.Detokenize, request, timeout)).text

    async def create_session(
        self,
        session_id: str = "",
        *,
        policy: str | None = None,
        ttl: float | timedelta | None = None,
        expire_time: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Create an empty session; the worker draws the id if none is given."""
        request = convert.create_session_request(session_id, policy, ttl, expire_time, labels)
        name = convert.session_name(session_id) if session_id else None
        return convert.session(await self._call(self._sessions.CreateSession, request, timeout, name))

    async def get_session(self, session: Session | str, *, timeout: float | None = None) -> Session:
        """Return a session by its name, its id, or an older look at it."""
        request = session_pb.GetSessionRequest(name=convert.session_name(session))
        return convert.session(await self._call(self._sessions.GetSession, request, timeout, request.name))

    async def list_sessions(
        self, *, page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[Session]:
        """Iterate over the tenant's sessions in order of name; pages are fetched as needed."""
        request = session_pb.ListSessionsRequest(page_size=page_size)
        while True:
            page = await self._call(self._sessions.ListSessions, request, timeout)
            for session in page.sessions:
                yield convert.session(session)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def update_session(
        self,
        session: Session | str,
        *,
        policy: str | None = None,
        ttl: float | timedelta | None = None,
        expire_time: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Change what is given; labels are replaced all together.

        After a change of the policy the next turn computes the cache anew, and its usage says so.
        """
        name = convert.session_name(session)
        request = convert.update_session_request(name, policy, ttl, expire_time, labels)
        return convert.session(await self._call(self._sessions.UpdateSession, request, timeout, name))

    async def fork_session(
        self, session: Session | str, session_id: str = "", *, timeout: float | None = None
    ) -> Session:
        """Copy what a session has committed into a new one; the worker draws the id if none is given."""
        request = session_pb.ForkSessionRequest(name=convert.session_name(session), session_id=session_id)
        return convert.session(await self._call(self._sessions.ForkSession, request, timeout, request.name))

    async def rewind_session(
        self, session: Session | str, turn_count: int, *, timeout: float | None = None
    ) -> Session:
        """Take a session's last turns back; its first `turn_count` stay.

        Where the worker keeps no checkpoint from then, the next turn computes the cache anew, and its usage
        says so.
        """
        name = convert.session_name(session)
        request = session_pb.RewindSessionRequest(name=name, turn_count=turn_count)
        return convert.session(await self._call(self._sessions.RewindSession, request, timeout, name))

    async def get_cache_map(
        self,
        session: Session | str,
        *,
        full: bool = False,
        layers: Sequence[int] = (),
        column_count: int = 0,
        token_limit: int = 0,
        timeout: float | None = None,
    ) -> CacheMap:
        """Return which tokens of its transcript a session's cache keeps, and why; changes nothing."""
        name = convert.session_name(session)
        request = convert.cache_map_request(name, full, layers, column_count, token_limit)
        return convert.cache_map(await self._call(self._sessions.GetCacheMap, request, timeout, name))

    async def delete_session(self, session: Session | str, *, timeout: float | None = None) -> None:
        """Delete a session and free its memory; a turn in flight is cancelled."""
        request = session_pb.DeleteSessionRequest(name=convert.session_name(session))
        await self._call(self._sessions.DeleteSession, request, timeout, request.name)

    async def export_session(
        self, session: Session | str, *, timeout: float | None = None
    ) -> AsyncGenerator[Chunk]:
        """Stream a session out: settings, transcript and cache. Write the chunks to a file, one after the
        other; `import_session` adds it to this or another worker of the same model.

        Yields:
            Chunks; the first knows how many bytes there are in all.
        """
        request = session_pb.ExportSessionRequest(name=convert.session_name(session))
        metadata = channel.metadata(self._tenant, request.name)
        call = self._sessions.ExportSession(request, timeout=timeout, metadata=metadata)
        try:
            async for response in call:
                yield Chunk(response.chunk, response.total_bytes)
        except grpc.RpcError as error:
            raise errors.restore(error) from error
        finally:
            call.cancel()

    async def import_session(
        self, chunks: Iterable[bytes], session_id: str = "", *, timeout: float | None = None
    ) -> Session:
        """Add a session that was exported; the worker draws the id if none is given. Chunks may have any size
        up to the worker's largest message."""
        requests = convert.import_session_requests(chunks, session_id)
        metadata = channel.metadata(self._tenant, convert.session_name(session_id) if session_id else None)
        try:
            return convert.session(
                await self._sessions.ImportSession(iter(requests), timeout=timeout, metadata=metadata)
            )
        except grpc.RpcError as error:
            raise errors.restore(error) from error

    async def get_model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """Return the served model."""
        request = model_pb.GetModelRequest(name=name)
        return convert.model(await self._call(self._models.GetModel, request, timeout))

    async def get_capacity(self, *, timeout: float | None = None) -> Capacity:
        """Return the worker's budgets and what is in use."""
        request = model_pb.GetCapacityRequest()
        return convert.capacity(await self._call(self._models.GetCapacity, request, timeout))

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout: float | None,
        session: str | None = None,
    ) -> Response:
        try:
            return await method(request, timeout=timeout, metadata=channel.metadata(self._tenant, session))
        except grpc.RpcError as error:
            raise errors.restore(error) from error

    async def _stream(
        self, request: generation_pb.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Delta]:
        metadata = channel.metadata(self._tenant, request.session)
        call = self._generation.StreamGenerate(request, timeout=timeout, metadata=metadata)
        try:
            async for response in call:
                yield convert.delta(response)
        except grpc.RpcError as error:
            raise errors.restore(error) from error
        finally:
            call.cancel()
