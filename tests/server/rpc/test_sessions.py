"""Sessions over a real socket."""

from __future__ import annotations

import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from apiary.v1 import session_pb2 as pb
from apiary.v1.session_pb2_grpc import SessionServiceStub

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


async def test_import_is_for_later_whatever_is_streamed(stub: SessionServiceStub) -> None:
    chunks = [pb.ImportSessionRequest(session_id="a"), pb.ImportSessionRequest(chunk=b"x")]
    for requests in ([], chunks):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ImportSession(iter(requests), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


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
