"""The one door of every method: bytes become messages, and whatever is raised becomes a status.

grpc.aio answers INTERNAL when its own deserialiser fails, and never answers a call that ends without a
message. So every method, health and reflection included, is served as a stream of bytes in both directions;
what the method itself is (unary or streaming) is settled here.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc import aio

from apiary_server.errors import ApiaryError, Internal, MalformedMessage, MethodNotImplemented
from apiary_server.rpc.caller import Context
from apiary_server.rpc.status import is_known, to_status

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs alone

log = structlog.get_logger(__name__)


class CallInterceptor(aio.ServerInterceptor):
    """Wraps the handler of each method, once."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Find the method's handler, wrapped; an unknown method has one that refuses."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:  # not remembered: callers could fill the memory with made-up names
                return grpc.stream_stream_rpc_method_handler(_unknown(method))
            self._wrapped[method] = _wrap(method, handler)
        return self._wrapped[method]


def _wrap(method: str, handler: Handler) -> Handler:
    behaviour: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    parse: Callable[[bytes], Any] = handler.request_deserializer  # type: ignore[assignment]

    async def answer(raw: AsyncIterator[bytes], context: Context) -> None:
        requests = _parsed(raw, parse)
        argument = requests if handler.request_streaming else await _first(requests)
        if inspect.isasyncgenfunction(behaviour):
            # closed here, on every way out: a generator that is left behind is closed whenever garbage
            # collection comes by
            async with contextlib.aclosing(behaviour(argument, context)) as responses:
                async for response in responses:
                    await context.write(response)
        else:
            response = await behaviour(argument, context)
            if not handler.response_streaming:
                await context.write(response)

    async def serve(raw: AsyncIterator[bytes], context: Context) -> None:
        with contextlib.suppress(aio.InternalError):  # gRPC's word for answering a caller that has left
            try:
                await answer(raw, context)
            except (aio.AbortError, aio.InternalError):
                raise
            except Exception as error:
                await _abort(method, error, context)

    return grpc.stream_stream_rpc_method_handler(
        serve,
        response_serializer=handler.response_serializer,
    )


def _unknown(method: str) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
    async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
        await _abort(method, MethodNotImplemented(f"no method {method}"), context)

    return refuse


async def _parsed(raw: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for data in raw:
        try:
            message = parse(data)
        except DecodeError as error:
            raise MalformedMessage(f"not the message that this method takes: {error}") from None
        yield message


async def _first(requests: AsyncIterator[Any]) -> Any:
    async for request in requests:
        return request
    raise MalformedMessage("the call ended without a message")


async def _abort(method: str, error: Exception, context: Context) -> None:
    known = error if isinstance(error, ApiaryError) and is_known(error) else _incident(method, error)
    status = to_status(known)
    log.debug("call refused", method=method, code=status.code.name, error=type(known).__name__)
    await context.abort_with_status(status)


def _incident(method: str, error: Exception) -> Internal:
    """Log a fault of ours whole, but for the exceptions' texts: these may quote a prompt."""
    incident = uuid.uuid4().hex[:12]
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("internal error", incident=incident, method=method, error=type(error).__name__, frames=frames)
    log.debug("internal error in full", incident=incident, exc_info=error)
    return Internal(incident)
