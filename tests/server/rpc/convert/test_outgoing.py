"""The domain's data become messages, whole."""

from __future__ import annotations

import dataclasses

from apiary.v1 import generation_pb2 as g
from apiary.v1 import session_pb2 as s
from apiary_server.engine.result import Delta, FinishReason
from apiary_server.rpc.convert import outgoing
from apiary_server.sessions.info import SessionInfo, State

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
