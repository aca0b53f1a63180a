"""Sessions over a real socket."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from apiary.v1 import session_pb2 as pb
from apiary.v1.session_pb2_grpc import SessionServiceStub
from apiary_server.rpc.app import App
from apiary_server.sessions.info import State
from apiary_server.settings import Settings

from .fake_engine import FakeEngine


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> SessionServiceStub:
    """The service."""
    return SessionServiceStub(channel)


async def test_create(stub: SessionServiceStub, engine: FakeEngine) -> None:
    created = await stub.CreateSession(
        pb.CreateSessionRequest(
            session_id="bees",
            session=pb.Session(policy="buzz(window=300)", ttl=Duration(seconds=90), labels={"a": "b"}),
        )
    )
    assert created.name == "sessions/bees"
    assert created.policy == "buzz(sink=4,window=300,threshold=400,stride=5)"
    assert created.create_time.ToMilliseconds() == created.update_time.ToMilliseconds() == 1_700_000_000_250
    assert created.WhichOneof("expiration") == "expire_time"
    assert created.expire_time.ToMilliseconds() == 1_700_000_090_250
    assert dict(created.labels) == {"a": "b"}
    assert created.state == pb.Session.STATE_EMPTY
    assert (created.turn_count, created.token_count, created.cache.bound) == (0, 0, 564)
    assert engine.sessions.created == [{"policy": "buzz(window=300)", "expire_time": None, "ttl": 90.0}]


async def test_create_with_nothing_said(stub: SessionServiceStub, engine: FakeEngine) -> None:
    created = await stub.CreateSession(pb.CreateSessionRequest())
    assert created.name.startswith("sessions/")
    assert engine.sessions.created == [{"policy": None, "expire_time": None, "ttl": None}]


async def test_create_with_an_end(stub: SessionServiceStub) -> None:
    end = Timestamp(seconds=int(time.time()) + 3600, nanos=500_000_000)
    created = await stub.CreateSession(pb.CreateSessionRequest(session=pb.Session(expire_time=end)))
    assert created.expire_time == end


async def test_get_and_delete(stub: SessionServiceStub) -> None:
    created = await stub.CreateSession(pb.CreateSessionRequest(session_id="a"))
    assert await stub.GetSession(pb.GetSessionRequest(name="sessions/a")) == created
    await stub.DeleteSession(pb.DeleteSessionRequest(name="sessions/a"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetSession(pb.GetSessionRequest(name="sessions/a"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_delete_waits_for_the_memory(stub: SessionServiceStub, engine: FakeEngine) -> None:
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a"))
    delete, freed = engine.keeper.delete, []

    def spy(tenant: str, id: str) -> object:
        done = delete(tenant, id)
        done.add_done_callback(lambda _: freed.append(id))
        return done

    engine.keeper.delete = spy  # type: ignore[method-assign, assignment]
    await stub.DeleteSession(pb.DeleteSessionRequest(name="sessions/a"))
    assert freed == ["a"]


async def test_pages(stub: SessionServiceStub) -> None:
    for place in range(7):
        await stub.CreateSession(pb.CreateSessionRequest(session_id=f"s{place}"))
    token, pages = "", []
    while True:
        page = await stub.ListSessions(pb.ListSessionsRequest(page_size=3, page_token=token))
        pages.append([session.name for session in page.sessions])
        token = page.next_page_token
        if not token:
            break
    assert pages == [
        ["sessions/s0", "sessions/s1", "sessions/s2"],
        ["sessions/s3", "sessions/s4", "sessions/s5"],
        ["sessions/s6"],
    ]


async def test_page_sizes(stub: SessionServiceStub, engine: FakeEngine) -> None:
    for place in range(1001):
        engine.sessions.create("default", f"s{place:04}", None, None, None, {})
    for asked, given in ((0, 50), (1000, 1000), (5000, 1000)):
        page = await stub.ListSessions(pb.ListSessionsRequest(page_size=asked))
        assert len(page.sessions) == given
        assert page.next_page_token


async def test_tenants_see_their_own(stub: SessionServiceStub) -> None:
    bees = (("x-apiary-tenant", "bees"),)
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a"), metadata=bees)
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a"))  # another tenant's name is free
    await stub.CreateSession(pb.CreateSessionRequest(session_id="b"))
    page = await stub.ListSessions(pb.ListSessionsRequest(), metadata=bees)
    assert [session.name for session in page.sessions] == ["sessions/a"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DeleteSession(pb.DeleteSessionRequest(name="sessions/b"), metadata=bees)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_fork(stub: SessionServiceStub) -> None:
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a", session=pb.Session(labels={"a": "b"})))
    forked = await stub.ForkSession(pb.ForkSessionRequest(name="sessions/a", session_id="b"))
    assert forked.name == "sessions/b"
    assert dict(forked.labels) == {"a": "b"}
    assert (await stub.ForkSession(pb.ForkSessionRequest(name="sessions/a"))).name == "sessions/drawn"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ForkSession(pb.ForkSessionRequest(name="sessions/a", session_id="b"))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_update(stub: SessionServiceStub) -> None:
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a", session=pb.Session(labels={"a": "b"})))

    async def update(paths: list[str], **settings: object) -> pb.Session:
        session = pb.Session(name="sessions/a", **settings)  # type: ignore[arg-type]
        mask = FieldMask(paths=paths)
        return await stub.UpdateSession(pb.UpdateSessionRequest(session=session, update_mask=mask))

    assert dict((await update([], labels={"c": "d"})).labels) == {"c": "d"}
    assert (await update(["ttl"], ttl=Duration(seconds=90))).expire_time.seconds == 1_700_000_090
    assert (await update(["policy"], policy="full", labels={"e": "f"})).labels == {"c": "d"}
    assert dict((await update(["labels"])).labels) == {}
    assert (await update(["*"], policy="buzz")).policy.startswith("buzz(")


async def test_rewind(stub: SessionServiceStub) -> None:
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a"))
    assert (await stub.RewindSession(pb.RewindSessionRequest(name="sessions/a"))).turn_count == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RewindSession(pb.RewindSessionRequest(name="sessions/a", turn_count=1))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_export(stub: SessionServiceStub, engine: FakeEngine) -> None:
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a"))
    messages = [message async for message in stub.ExportSession(pb.ExportSessionRequest(name="sessions/a"))]
    assert b"".join(message.chunk for message in messages) == b"0003000000" + bytes(3_000_000)
    assert [message.total_bytes for message in messages] == [3_000_010] + [0] * (len(messages) - 1)
    assert max(len(message.chunk) for message in messages) <= 2**20


async def test_import(stub: SessionServiceStub, engine: FakeEngine) -> None:
    data = b"0003000000" + bytes(3_000_000)
    chunks = [data[:3], data[3:4], b"", data[4:2_000_000], data[2_000_000:]]
    requests = [
        pb.ImportSessionRequest(session_id="a" * (not place), chunk=chunk)
        for place, chunk in enumerate(chunks)
    ]
    assert (await stub.ImportSession(iter(requests))).name == "sessions/a"
    assert engine.porter.taken_in == [data]


async def refusal(stub: SessionServiceStub, *requests: pb.ImportSessionRequest) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ImportSession(iter(requests))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


async def test_imports_that_are_refused(stub: SessionServiceStub, engine: FakeEngine) -> None:
    assert "chunk" in await refusal(stub)
    whole = b"0000000003abc"
    second = pb.ImportSessionRequest(session_id="b", chunk=whole[3:])
    assert "first message alone" in await refusal(stub, pb.ImportSessionRequest(chunk=whole[:3]), second)
    assert "cut off" in await refusal(stub, pb.ImportSessionRequest(chunk=whole[:-1]))
    more = [pb.ImportSessionRequest(chunk=whole), *[pb.ImportSessionRequest(chunk=b"more")] * 1000]
    assert "cut off" in await refusal(stub, *more)
    assert len(engine.porter.taken_in[-1]) < 50, "the others are not waited for"


async def read_all(call: grpc.aio.UnaryStreamCall[pb.ExportSessionRequest, pb.ExportSessionResponse]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("settings", [Settings(listen="127.0.0.1:0", stall_limit=0.5)])
async def test_whoever_takes_nothing_is_dropped(stub: SessionServiceStub, engine: FakeEngine) -> None:
    """Two who take nothing would keep all others from exporting."""
    await stub.CreateSession(pb.CreateSessionRequest(session_id="a"))
    engine.porter.size = 50_000_000
    idle = [stub.ExportSession(pb.ExportSessionRequest(name="sessions/a")) for _ in range(2)]
    for call in idle:
        await call.read()
    engine.porter.size = 10
    third = stub.ExportSession(pb.ExportSessionRequest(name="sessions/a"))
    assert (await third.read()).total_bytes == 20  # when one of them was dropped
    await asyncio.sleep(1)  # and the other, which came later
    for call in idle:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_cache_map(stub: SessionServiceStub, engine: FakeEngine) -> None:
    info = engine.sessions.create("default", "a", None, None, None, {})
    empty = await stub.GetCacheMap(pb.GetCacheMapRequest(name="sessions/a"))
    assert (empty.name, empty.state, empty.entries) == ("sessions/a", pb.Session.STATE_EMPTY, 0)
    assert [*empty.columns, *empty.tokens] == []
    engine.sessions.table["default", "a"] = dataclasses.replace(info, state=State.PARKED, turn_count=1)
    request = pb.GetCacheMapRequest(name="sessions/a", column_count=3, token_limit=2)
    drawn = await stub.GetCacheMap(request)
    assert (drawn.state, drawn.entries, drawn.kv_heads) == (pb.Session.STATE_PARKED, 4, 2)
    assert (drawn.token_count, drawn.kept_token_count) == (9, 6)
    assert [(column.start, column.stop) for column in drawn.columns] == [(0, 3), (3, 6), (6, 9)]
    assert [column.kind for column in drawn.columns] == [
        pb.CacheMap.KIND_HEAVY,
        pb.CacheMap.KIND_HEAVY,
        pb.CacheMap.KIND_WINDOW,
    ]
    assert [(layer.layer, list(layer.column_entries)) for layer in drawn.layers] == [
        (0, [2, 2, 4]),
        (1, [2, 2, 4]),
    ]
    kinds = pb.CacheMap.KIND_HEAVY, pb.CacheMap.KIND_WINDOW
    counts = [pb.KindCount(kind=kind, entries=4) for kind in kinds]
    assert all(list(layer.kinds) == counts and not layer.heads for layer in drawn.layers)
    first, second = drawn.tokens
    assert first == pb.KeptToken(
        position=0, token_id=100, text="t100", head_count=4, mean_score=0, kinds=[pb.CacheMap.KIND_HEAVY]
    )
    assert (second.position, second.head_count, second.mean_score) == (3, 2, 0.75)

    request = pb.GetCacheMapRequest(name="sessions/a", view=pb.GetCacheMapRequest.VIEW_FULL, layers=[1])
    full = await stub.GetCacheMap(request)
    (layer,) = full.layers
    assert layer.layer == 1
    assert [list(head.positions) for head in layer.heads] == [[0, 3, 7, 8], [0, 5, 7, 8]]
    assert [list(head.scores) for head in layer.heads] == [[0, 0.75, 1.75, 2], [0, 1.25, 1.75, 2]]
    assert all(list(head.kinds) == [kinds[0]] * 2 + [kinds[1]] * 2 for head in layer.heads)
    assert [token.text for token in full.tokens] == ["t100", "t103", "t105", "t107", "t108"]


async def test_a_map_of_a_busy_session(stub: SessionServiceStub, engine: FakeEngine) -> None:
    engine.sessions.create("default", "a", None, None, None, {})
    engine.sessions.begin("default", "a")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetCacheMap(pb.GetCacheMapRequest(name="sessions/a"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_full_map_is_no_larger_than_a_message(engine: FakeEngine, settings: Settings) -> None:
    info = engine.sessions.create("default", "a", None, None, None, {})
    engine.sessions.table["default", "a"] = dataclasses.replace(info, turn_count=1)
    full = pb.GetCacheMapRequest(name="sessions/a", view=pb.GetCacheMapRequest.VIEW_FULL)
    app = App(engine, settings.model_copy(update={"max_message_bytes": 1500}))  # type: ignore[arg-type]
    await app.start()
    async with grpc.aio.insecure_channel(app.address) as channel:
        stub = SessionServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetCacheMap(full)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "name at most 1" in (caught.value.details() or "")
        full.layers.append(0)
        assert (await stub.GetCacheMap(full)).ByteSize() <= 1500
    await app.stop(0)
