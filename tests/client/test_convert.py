"""Conversion loses nothing: every field of the API has its place in the dataclasses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from apiary.v1 import generation_pb2, model_pb2, session_pb2
from apiary_client import convert
from apiary_client.cache_map import (
    CacheMap,
    EntryKind,
    HeadMap,
    KeptToken,
    KindCount,
    LayerMap,
    MapColumn,
)
from apiary_client.types import (
    Capacity,
    Completion,
    Delta,
    FinishReason,
    Message,
    Model,
    OnCancel,
    RebuildReason,
    Sampling,
    Session,
    State,
    Stopping,
    TokenLogprob,
    TopLogprob,
    TurnOptions,
    Usage,
    WhenBusy,
)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Sampling, generation_pb2.Sampling),
        (Stopping, generation_pb2.Stopping),
        (Delta, generation_pb2.StreamGenerateResponse),
        (Completion, generation_pb2.GenerateResponse),
        (TokenLogprob, generation_pb2.TokenLogprob),
        (TopLogprob, generation_pb2.TopLogprob),
        (Usage, generation_pb2.Usage),
        (Model, model_pb2.Model),
        (Capacity, model_pb2.Capacity),
        (CacheMap, session_pb2.CacheMap),
        (LayerMap, session_pb2.LayerMap),
        (HeadMap, session_pb2.HeadMap),
        (KindCount, session_pb2.KindCount),
        (KeptToken, session_pb2.KeptToken),
        (MapColumn, session_pb2.MapColumn),
    ],
)
def test_dataclasses_have_the_fields_of_the_api(kind: Any, message: Any) -> None:
    assert {item.name for item in fields(kind)} == set(message.DESCRIPTOR.fields_by_name)


def test_sessions_have_the_fields_of_the_api() -> None:
    api = set(session_pb2.Session.DESCRIPTOR.fields_by_name)
    assert {item.name for item in fields(Session)} == api - {"ttl"}  # ttl is input only


def test_turns_can_set_every_field_of_a_request() -> None:
    api = set(generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert set(TurnOptions.__annotations__) | {"messages"} == api


@pytest.mark.parametrize(
    ("known", "enum"),
    [
        (convert._ROLES.values(), generation_pb2.ChatMessage.Role),
        (convert._ON_CANCEL.values(), generation_pb2.OnCancel),
        (convert._WHEN_BUSY.values(), generation_pb2.WhenBusy),
        (convert._FINISH_REASONS, generation_pb2.FinishReason),
        (convert._REBUILD_REASONS, generation_pb2.Usage.RebuildReason),
        (convert._STATES, session_pb2.Session.State),
        (convert._KINDS, session_pb2.CacheMap.Kind),
    ],
)
def test_enums_are_whole(known: Any, enum: Any) -> None:
    assert set(known) | {0} == set(enum.values())


def test_a_turn_carries_all_that_was_asked() -> None:
    request = convert.generate_request(
        [Message("system", "Be brief."), Message("user", "Hi")],
        session="work",
        sampling=Sampling(temperature=0.5, top_k=3, logit_bias={7: -1.5}, seed=2**64 - 1),
        stopping=Stopping(max_tokens=5, stop=["\n"], stop_token_ids=[2], ignore_eos=True),
        policy="full",
        logprobs=0,
        priority=-3,
        request_id="r",
        on_cancel=OnCancel.KEEP,
        when_busy=WhenBusy.WAIT,
    )
    assert [(m.role, m.content) for m in request.messages.messages] == [(1, "Be brief."), (2, "Hi")]
    assert request.session == "sessions/work"
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 3)
    assert dict(request.sampling.logit_bias) == {7: -1.5}
    assert request.sampling.seed == 2**64 - 1
    assert not request.sampling.HasField("top_p")
    stopping = request.stopping
    assert (stopping.max_tokens, list(stopping.stop), list(stopping.stop_token_ids)) == (5, ["\n"], [2])
    assert stopping.ignore_eos
    assert (request.policy, request.priority, request.request_id) == ("full", -3, "r")
    assert request.HasField("logprobs")
    assert request.on_cancel == generation_pb2.ON_CANCEL_KEEP
    assert request.when_busy == generation_pb2.WHEN_BUSY_WAIT


def test_an_untouched_option_is_absent() -> None:
    request = convert.generate_request("Hi", sampling=None, stopping=None, session=None)
    bare = generation_pb2.ChatMessage(role=generation_pb2.ChatMessage.ROLE_USER, content="Hi")
    assert request == generation_pb2.GenerateRequest(messages=generation_pb2.ChatMessages(messages=[bare]))


def test_empty_inputs_are_sent_not_lost() -> None:
    assert convert.generate_request(None, text="").WhichOneof("input") == "text"
    assert convert.generate_request(None, token_ids=[]).WhichOneof("input") == "token_ids"
    assert convert.generate_request([]).WhichOneof("input") == "messages"
    assert convert.tokenize_request(None, "").WhichOneof("input") == "text"


def test_one_message_is_a_chat() -> None:
    assert convert.generate_request(Message("user", "Hi")) == convert.generate_request("Hi")
    assert convert.tokenize_request("Hi", None).messages == convert.generate_request("Hi").messages


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"messages": None}, "exactly one of messages, text, token_ids; got none"),
        ({"messages": "a", "text": "b"}, "got messages and text"),
        ({"messages": None, "text": "a", "token_ids": [1]}, "got text and token_ids"),
        ({"messages": [Message("bee", "buzz")]}, "role 'bee' is none of system, user, assistant"),  # type: ignore[arg-type]
        ({"messages": "a", "sampling": Sampling(top_k=-1)}, "-1"),
        ({"messages": "a", "stopping": Stopping(max_tokens=2**32)}, "4294967296"),
    ],
)
def test_what_cannot_be_sent_is_refused(arguments: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        convert.generate_request(**arguments)


@pytest.mark.parametrize("message", [("user", "Hi"), {"role": "user", "content": "Hi"}])
def test_what_is_no_message_is_told(message: Any) -> None:
    with pytest.raises(TypeError, match=r"a message is a Message\('user', 'Hello!'\), not a (tuple|dict)"):
        convert.generate_request([message])


@pytest.mark.parametrize("session", ["work", "sessions/work"])
def test_sessions_go_by_id_or_name(session: str) -> None:
    assert convert.session_name(session) == "sessions/work"


def test_sessions_go_by_an_older_look() -> None:
    look = convert.session(session_pb2.Session(name="sessions/work"))
    assert convert.session_name(look) == "sessions/work"
    assert look.id == "work"


def test_a_session_expires_as_asked() -> None:
    def settings(ttl: float | timedelta | None, expire_time: datetime | None) -> session_pb2.Session:
        return convert.create_session_request("a", "full", ttl, expire_time, {"team": "bees"}).session

    when = datetime(2027, 1, 1, tzinfo=UTC)
    assert settings(1.5, None).ttl.ToTimedelta() == timedelta(seconds=1.5)
    assert settings(timedelta(hours=1), None).ttl.seconds == 3600
    assert settings(None, when).expire_time.ToDatetime(UTC) == when
    assert settings(None, None) == session_pb2.Session(policy="full", labels={"team": "bees"})


def test_an_ambiguous_expiry_is_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        convert.create_session_request("a", None, 1.0, datetime(2027, 1, 1, tzinfo=UTC), None)
    with pytest.raises(ValueError, match="time zone"):
        convert.create_session_request("a", None, None, datetime(2027, 1, 1), None)


def test_only_the_last_delta_ends() -> None:
    usage = generation_pb2.Usage(completion_tokens=3, seed=5)
    usage.prefill_time.FromMilliseconds(1250)
    first = convert.delta(generation_pb2.StreamGenerateResponse(text="a", token_ids=[1, 2], index=4))
    last = convert.delta(generation_pb2.StreamGenerateResponse(finish_reason=2, usage=usage))
    assert first == Delta("a", (1, 2), 4)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage == Usage(0, 0, 3, 0, 0.0, 1.25, 0.0, 5, None)


def test_values_newer_than_this_client_are_unknown() -> None:
    response = generation_pb2.GenerateResponse(finish_reason=99, usage={"rebuild_reason": 99})  # type: ignore[arg-type]
    assert convert.completion(response).finish_reason is FinishReason.UNKNOWN
    assert convert.completion(response).usage.rebuild_reason is RebuildReason.UNKNOWN
    assert convert.session(session_pb2.Session(state=99)).state is State.UNKNOWN  # type: ignore[arg-type]


def test_kinds_newer_than_this_client_are_unknown() -> None:
    response = session_pb2.CacheMap(columns=[{"kind": 99}, {}], tokens=[{"kinds": [99]}])  # type: ignore[list-item]
    drawn = convert.cache_map(response)
    assert [column.kind for column in drawn.columns] == [EntryKind.UNKNOWN, None]
    assert drawn.tokens == (KeptToken(0, 0, "", 0, None, (EntryKind.UNKNOWN,)),)


def test_a_stop_string_is_not_its_letters() -> None:
    assert convert._stopping(Stopping(stop="END")).stop == ["END"]
    assert convert._stopping(Stopping(stop=["a", "b"])).stop == ["a", "b"]


def test_every_value_of_the_api_has_a_name_here() -> None:
    for kind, names in (
        (session_pb2.Session.State, convert._STATES),
        (generation_pb2.Usage.RebuildReason, convert._REBUILD_REASONS),
        (generation_pb2.FinishReason, convert._FINISH_REASONS),
    ):
        assert names.keys() == set(kind.values()) - {0}
