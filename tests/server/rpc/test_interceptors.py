"""Bytes in, statuses out, whatever the method's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import grpc
import pytest
import structlog

from apiary_server.errors import SessionBusy
from apiary_server.rpc.caller import Context
from apiary_server.rpc.interceptors import CallInterceptor

from .answers import ask

SECRET = "my prompt"
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)]


class _NotOurs(Exception):
    """A fault that no table has."""


async def _echo(request: bytes, context: Context) -> bytes:
    return request


async def _twice(request: bytes, context: Context) -> AsyncIterator[bytes]:
    yield request
    if request == b"fail":
        raise _NotOurs(SECRET)
    yield request


async def _write(request: bytes, context: Context) -> None:
    await context.write(request)


async def _join(requests: AsyncIterator[bytes], context: Context) -> bytes:
    return b"".join([request async for request in requests])


async def _each(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _fail(request: bytes, context: Context) -> bytes:
    raise _NotOurs(SECRET)


async def _abort(request: bytes, context: Context) -> bytes:
    await context.abort(grpc.StatusCode.DATA_LOSS, "its own word")


async def _flood(request: bytes, context: Context) -> AsyncIterator[bytes]:
    while True:
        yield b"x" * 10_000


async def _late(request: bytes, context: Context) -> bytes:
    try:
        await asyncio.sleep(10)
    except asyncio.CancelledError:
        raise SessionBusy("after the caller has left") from None
    return b""


def _same(data: bytes) -> bytes:
    return data


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of small methods behind the interceptor."""
    shapes = {
        "Echo": grpc.unary_unary_rpc_method_handler(_echo, _same, _same),
        "Twice": grpc.unary_stream_rpc_method_handler(_twice, _same, _same),
        "Write": grpc.unary_stream_rpc_method_handler(_write, _same, _same),
        "Join": grpc.stream_unary_rpc_method_handler(_join, _same, _same),
        "Each": grpc.stream_stream_rpc_method_handler(_each, _same, _same),
        "Fail": grpc.unary_unary_rpc_method_handler(_fail, _same, _same),
        "Abort": grpc.unary_unary_rpc_method_handler(_abort, _same, _same),
        "Flood": grpc.unary_stream_rpc_method_handler(_flood, _same, _same),
        "Late": grpc.unary_unary_rpc_method_handler(_late, _same, _same),
        "Unsendable": grpc.unary_unary_rpc_method_handler(_echo, _same, len),
    }
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", shapes),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", SMALL_WINDOW) as connected:
        yield connected
    await server.stop(0)


@pytest.mark.parametrize(
    ("method", "sent", "received"),
    [
        ("Echo", [b"a"], [b"a"]),
        ("Echo", [b""], [b""]),
        ("Twice", [b"a"], [b"a", b"a"]),
        ("Write", [b"a"], [b"a"]),
        ("Join", [b"a", b"b"], [b"ab"]),
        ("Join", [], [b""]),
        ("Each", [b"a", b"b"], [b"a", b"b"]),
        ("Each", [], []),
    ],
)
async def test_shapes(
    channel: grpc.aio.Channel, method: str, sent: list[bytes], received: list[bytes]
) -> None:
    for _ in range(2):  # found, then remembered
        call = channel.stream_stream(f"/a.B/{method}")(iter(sent), timeout=10)
        assert [response async for response in call] == received


async def test_a_unary_call_without_a_message(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.stream_unary("/a.B/Echo")(iter([]), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_method_may_abort_by_itself(channel: grpc.aio.Channel) -> None:
    answer = await ask(channel, "/a.B/Abort", b"")
    assert (answer.code, answer.message) == (grpc.StatusCode.DATA_LOSS, "its own word")


@pytest.mark.parametrize(
    ("method", "payload", "error", "frame"),
    [
        ("Fail", b"", "_NotOurs", "in _fail"),
        ("Twice", b"fail", "_NotOurs", "in _twice"),
        ("Unsendable", b"abc", "TypeError", ""),
    ],
)
async def test_a_fault_of_ours(
    channel: grpc.aio.Channel, method: str, payload: bytes, error: str, frame: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        answer = await ask(channel, f"/a.B/{method}", payload)
    assert (answer.code, answer.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    incident = answer.details["ErrorInfo"].metadata["incident"]
    assert incident in answer.message
    assert SECRET not in answer.message
    (logged,) = [one for one in logs if one["log_level"] == "error"]
    assert logged["incident"] == incident
    assert logged["error"] == error
    assert logged["method"] == f"/a.B/{method}"
    assert frame in logged["frames"]
    assert SECRET not in str(logged)


@pytest.mark.parametrize("method", ["Flood", "Late"])
async def test_a_caller_that_leaves_is_no_fault_of_ours(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        call = channel.unary_stream(f"/a.B/{method}")(b"")
        await asyncio.sleep(0.3)  # by now a flood has filled the window, and its write waits
        assert call.cancel()
        await asyncio.sleep(0.3)
    assert {one["log_level"] for one in logs} <= {"debug"}
    assert not caplog.records


async def test_unknown_methods_are_not_remembered() -> None:
    interceptor = CallInterceptor()

    async def nothing(_: object) -> None:
        return None

    for name in ("x", "y"):
        handler = await interceptor.intercept_service(nothing, SimpleNamespace(method=name))
        assert handler.stream_stream is not None
    assert interceptor._wrapped == {}
