"""The domain's data become messages, whole."""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np
import pytest

from apiary.v1 import generation_pb2 as g
from apiary.v1 import session_pb2 as s
from apiary_server.engine.cache_map import CacheCopy, draw
from apiary_server.engine.request import CacheMapRequest
from apiary_server.engine.result import Delta, FinishReason
from apiary_server.errors import InvalidField
from apiary_server.rpc.convert import outgoing
from apiary_server.sessions.info import SessionInfo, State
from buzz import Kind, parse

from ..fake_engine import USAGE


def test_every_state_and_finish_reason_has_a_value() -> None:
    states = {outgoing._STATES[state] for state in State}
    assert states == set(s.Session.State.values()) - {s.Session.STATE_UNSPECIFIED}
    reasons = {outgoing._FINISH_REASONS[reason] for reason in FinishReason}
    assert reasons == set(g.FinishReason.values()) - {g.FINISH_REASON_UNSPECIFIED}


def test_a_first_delta_says_little() -> None:
    message = outgoing.stream_response(Delta("a", [5], 3))
    assert message == g.StreamGenerateResponse(text="a", token_ids=[5], index=3)


def test_a_last_delta_says_all() -> None:
    message = outgoing.stream_response(
        Delta("", [], 4, [], FinishReason.STOP, dataclasses.replace(USAGE, durable=True))
    )
    assert message.finish_reason == g.FINISH_REASON_STOP
    named = {field.name for field, _ in message.usage.ListFields()}
    assert named == {field.name for field in g.Usage.DESCRIPTOR.fields} - {"rebuild_reason"}


def test_a_session() -> None:
    info = SessionInfo("a", "buzz", 1.5, 2.000001, 3.0, {"k": "v"}, State.BUSY, 2, 3, 4, 5, 6)
    message = outgoing.session(info)
    assert {field.name for field, _ in message.ListFields()} == {
        field.name for field in s.Session.DESCRIPTOR.fields
    } - {"ttl"}
    assert message.update_time.ToMicroseconds() == 2_000_001
    assert (message.cache.entries, message.cache.bound, message.cache.bytes) == (4, 5, 6)


def test_every_kind_has_a_value() -> None:
    """But for pins: there are none yet."""
    assert {outgoing._KINDS[kind] for kind in (None, *Kind)} | {s.CacheMap.KIND_PINNED} == set(
        s.CacheMap.Kind.values()
    )


@pytest.mark.parametrize("seen", [20, 300, 3_000_000])
@pytest.mark.parametrize(("shape", "columns"), [((1, 1, 8), 1), ((3, 2, 16), 512), ((30, 3, 20), 64)])
@pytest.mark.parametrize("text", ["", "x" * 50, "🐝" * 40], ids=["nothing", "letters", "bees"])
def test_a_full_map_is_no_larger_than_it_may_be(
    seen: int, shape: tuple[int, int, int], columns: int, text: str
) -> None:
    random = np.random.default_rng(0)
    heads = [np.sort(random.permutation(min(seen, 10**5))[: shape[2]]) for _ in range(shape[0] * shape[1])]
    position = (np.array(heads).reshape(shape) + seen - min(seen, 10**5)).astype(np.int32)
    copy = CacheCopy(
        id="a" * 63,
        policy=parse("buzz(sink=2,window=5,threshold=9)"),
        state=State.RESIDENT,
        sampled=3,
        seen=seen,
        position=position,
        score=np.ones(shape, np.float32),
        tokens=array("I", [2**31 - 1]) * seen,
    )
    request, size = CacheMapRequest(full=True, column_count=columns), 10**6
    while True:  # the bound that just lets it pass is one that it keeps
        try:
            message = outgoing.cache_map(draw(copy, request, lambda _, places: [text] * len(places), size))
        except InvalidField:
            break
        assert message.ByteSize() <= size
        size = size * 4 // 5
