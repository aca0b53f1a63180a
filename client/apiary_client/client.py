"""The synchronous client. Safe to share between threads."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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
    """Talks to one worker, or to a router before many.

    Args:
        target: `host:port`, or any gRPC target.
        tenant: on whose behalf; the worker's default tenant if None.
        tls: how to encrypt; plaintext if None.
        max_message_bytes: the largest message to send or take.

    Every call takes `timeout` in seconds (None waits for ever) and raises `ApiaryError` when it fails;
    ValueError when an argument cannot even be sent. Calls that only read are repeated while the worker is
    unavailable; turns, creations and deletions never are.
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
            grpc.secure_channel(target, tls.credentials(), options)
            if tls
            else grpc.insecure_channel(target, options)
        )
        self._generation = GenerationServiceStub(self._channel)
        self._sessions = SessionServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def generate(
        self, messages: Chat | None = None, *, timeout: float | None = None, **options: Unpack[TurnOptions]
    ) -> Completion:
        """Run one turn and return the whole answer.

        The input is `messages` (a bare string is the user's message), or `text=` or `token_ids=`; see
        `TurnOptions` for the rest.
        """
        request = convert.generate_request(messages, **options)
        return convert.completion(self._call(self._generation.Generate, request, timeout, request.session))

    def stream(
        self, messages: Chat | None = None, *, timeout: float | None = None, **options: Unpack[TurnOptions]
    ) -> Generator[Delta]:
        """Run one turn and iterate over the pieces of its answer; takes what `generate` takes.

        The call starts with the first piece. Leaving the loop early, or `close()` on the iterator,
        cancels it, and the session is as it was before the turn; unless `on_cancel` keeps what came, or a
        `request_id` lets the turn run on for a while, so that the same request can go on with it.
        """
        return self._stream(convert.generate_request(messages, **options), timeout)

    def tokenize(
        self, messages: Chat | None = None, *, text: str | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Return the token ids of chat messages, as a first turn would see them, or of plain `text`."""
        request = convert.tokenize_request(messages, text)
        return tuple(self._call(self._generation.Tokenize, request, timeout).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """Return the text of token ids."""
        request = generation_pb.DetokenizeRequest(token_ids=token_ids)
        return self._call(self._generation.Detokenize, request, timeout).text

    def create_session(
        self,
        session_id: str = "",
        *,
        policy: str | None = None,
        ttl: float | timedelta | None = None,
        expire_time: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Create an empty session; the worker draws the id if none is given.

        `ttl` counts from the last turn, in seconds; `expire_time` is fixed and has a time zone.
        """
        request = convert.create_session_request(session_id, policy, ttl, expire_time, labels)
        name = convert.session_name(session_id) if session_id else None
        return convert.session(self._call(self._sessions.CreateSession, request, timeout, name))

    def get_session(self, session: Session | str, *, timeout: float | None = None) -> Session:
        """Return a session by its name, its id, or an older look at it."""
        request = session_pb.GetSessionRequest(name=convert.session_name(session))
        return convert.session(self._call(self._sessions.GetSession, request, timeout, request.name))

    def list_sessions(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Session]:
        """Iterate over the tenant's sessions in order of name; pages are fetched as needed.

        `timeout` holds for each page; `page_size` 0 lets the worker choose.
        """
        request = session_pb.ListSessionsRequest(page_size=page_size)
        while True:
            page = self._call(self._sessions.ListSessions, request, timeout)
            yield from map(convert.session, page.sessions)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def update_session(
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
        return convert.session(self._call(self._sessions.UpdateSession, request, timeout, name))

    def fork_session(
        self, session: Session | str, session_id: str = "", *, timeout: float | None = None
    ) -> Session:
        """Copy what a session has committed into a new one; the worker draws the id if none is given."""
        request = session_pb.ForkSessionRequest(name=convert.session_name(session), session_id=session_id)
        return convert.session(self._call(self._sessions.ForkSession, request, timeout, request.name))

    def rewind_session(
        self, session: Session | str, turn_count: int, *, timeout: float | None = None
    ) -> Session:
        """Take a session's last turns back; its first `turn_count` stay.

        Where the worker keeps no checkpoint from then, the next turn computes the cache anew, and its usage
        says so.
        """
        name = convert.session_name(session)
        request = session_pb.RewindSessionRequest(name=name, turn_count=turn_count)
        return convert.session(self._call(self._sessions.RewindSession, request, timeout, name))

    def get_cache_map(
        self,
        session: Session | str,
        *,
        full: bool = False,
        layers: Sequence[int] = (),
        column_count: int = 0,
        token_limit: int = 0,
        timeout: float | None = None,
    ) -> CacheMap:
        """Return which tokens of its transcript a session's cache keeps, and why; changes nothing.

        Args:
            session: its name, its id, or an older look at it.
            full: each entry of each layer and head, and all kept tokens.
            layers: of these layers, from 0; of all if empty.
            column_count: in how many columns of neighbouring tokens to count; 0 lets the worker choose.
            token_limit: the most tokens in a summary; 0 lets the worker choose.
            timeout: in seconds.
        """
        name = convert.session_name(session)
        request = convert.cache_map_request(name, full, layers, column_count, token_limit)
        return convert.cache_map(self._call(self._sessions.GetCacheMap, request, timeout, name))

    def delete_session(self, session: Session | str, *, timeout: float | None = None) -> None:
        """Delete a session and free its memory; a turn in flight is cancelled."""
        request = session_pb.DeleteSessionRequest(name=convert.session_name(session))
        self._call(self._sessions.DeleteSession, request, timeout, request.name)

    def export_session(self, session: Session | str, *, timeout: float | None = None) -> Iterator[Chunk]:
        """Stream a session out: settings, transcript and cache. Write the chunks to a file, one after the
        other; `import_session` adds it to this or another worker of the same model.

        Yields:
            Chunks; the first knows how many bytes there are in all.
        """
        request = session_pb.ExportSessionRequest(name=convert.session_name(session))
        metadata = channel.metadata(self._tenant, request.name)
        call = self._sessions.ExportSession(request, timeout=timeout, metadata=metadata)
        try:
            for response in call:
                yield Chunk(response.chunk, response.total_bytes)
        except grpc.RpcError as error:
            raise errors.restore(error) from error
        finally:
            call.cancel()

    def import_session(
        self, chunks: Iterable[bytes], session_id: str = "", *, timeout: float | None = None
    ) -> Session:
        """Add a session that was exported; the worker draws the id if none is given. Chunks may have any size
        up to the worker's largest message."""
        requests = convert.import_session_requests(chunks, session_id)
        metadata = channel.metadata(self._tenant, convert.session_name(session_id) if session_id else None)
        try:
            return convert.session(self._sessions.ImportSession(requests, timeout=timeout, metadata=metadata))
        except grpc.RpcError as error:
            raise errors.restore(error) from error

    def get_model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """Return the served model."""
        request = model_pb.GetModelRequest(name=name)
        return convert.model(self._call(self._models.GetModel, request, timeout))

    def get_capacity(self, *, timeout: float | None = None) -> Capacity:
        """Return the worker's budgets and what is in use."""
        request = model_pb.GetCapacityRequest()
        return convert.capacity(self._call(self._models.GetCapacity, request, timeout))

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout: float | None,
        session: str | None = None,
    ) -> Response:
        try:
            return method(request, timeout=timeout, metadata=channel.metadata(self._tenant, session))
        except grpc.RpcError as error:
            raise errors.restore(error) from error

    def _stream(self, request: generation_pb.GenerateRequest, timeout: float | None) -> Generator[Delta]:
        metadata = channel.metadata(self._tenant, request.session)
        call = self._generation.StreamGenerate(request, timeout=timeout, metadata=metadata)
        try:
            for response in call:
                yield convert.delta(response)
        except grpc.RpcError as error:
            raise errors.restore(error) from error
        finally:
            call.cancel()
