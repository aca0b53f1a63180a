"""Requests become models, and what is wrong is named by its protobuf path."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel

from apiary.v1 import generation_pb2 as g
from apiary.v1 import model_pb2 as m
from apiary.v1 import session_pb2 as s
from apiary_server.engine.request import Sampling, Stopping, Text
from apiary_server.errors import InvalidField, ModelNotFound
from apiary_server.rpc.caller import Caller
from apiary_server.rpc.convert import incoming, outgoing
from apiary_server.sessions.request import LONGEST_LIFE, NewSession, SessionChange

from ..bad_requests import ASSISTANT, SYSTEM, USER, chat
from ..fake_engine import MODEL


def _turn(request: g.GenerateRequest, caller: Caller | None = None) -> incoming.TurnRequest:
    return incoming.turn_request(request, caller or Caller(), longest=10)


def _refused(call: Callable[[], object]) -> list[tuple[str, str]]:
    with pytest.raises(InvalidField) as caught:
        call()
    return caught.value.violations


def test_a_bare_turn_has_the_models_defaults() -> None:
    turn = _turn(g.GenerateRequest(text="hi"))
    assert turn.input == Text(text="hi")
    assert (turn.sampling, turn.stopping) == (Sampling(), Stopping())
    assert (turn.session, turn.policy, turn.logprobs, turn.priority) == (None, None, None, 0)


def test_a_full_turn() -> None:
    turn = _turn(
        g.GenerateRequest(
            session="sessions/a.b-c_1",
            messages=chat((SYSTEM, "be"), (USER, "x"), (ASSISTANT, "y"), (USER, "z")),
            sampling=g.Sampling(
                temperature=0.5,
                top_k=3,
                top_p=0.75,
                min_p=0.125,
                repetition_penalty=1.5,
                presence_penalty=-1,
                frequency_penalty=1,
                logit_bias={5: -2.5},
                seed=2**64 - 1,
            ),
            stopping=g.Stopping(max_tokens=7, stop=["a", "b"], stop_token_ids=[1, 2], ignore_eos=True),
            priority=-3,
            logprobs=0,
        ),
        Caller("bees", 12.5, {"traceparent": "x"}),
    )
    assert [(one.role, one.content) for one in turn.input.messages] == [
        ("system", "be"),
        ("user", "x"),
        ("assistant", "y"),
        ("user", "z"),
    ]
    assert turn.session == "a.b-c_1"
    assert turn.sampling == Sampling(
        temperature=0.5,
        top_k=3,
        top_p=0.75,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        logit_bias={5: -2.5},
        seed=2**64 - 1,
    )
    assert turn.stopping == Stopping(max_tokens=7, stop=("a", "b"), stop_token_ids=(1, 2), ignore_eos=True)
    assert (turn.priority, turn.logprobs, turn.tenant, turn.deadline) == (-3, 0, "bees", 12.5)
    assert (turn.trace.operation, turn.trace.headers) == ("chat", {"traceparent": "x"})


def test_text_is_completed() -> None:
    assert _turn(g.GenerateRequest(text="hi")).trace.operation == "text_completion"


@pytest.mark.parametrize(("message", "model"), [(g.Sampling, Sampling), (g.Stopping, Stopping)])
def test_message_and_model_have_the_same_fields(message: type, model: type[BaseModel]) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == set(model.model_fields)


def test_every_field_of_a_turn_is_read_or_refused() -> None:
    input_only = {"messages", "text", "token_ids"}
    named_otherwise = {"keep": "on_cancel", "wait": "when_busy"}
    ours = set(incoming.TurnRequest.model_fields) - {"input", "tenant", "deadline", "trace"}
    names = {named_otherwise.get(name, name) for name in ours}
    assert {field.name for field in g.GenerateRequest.DESCRIPTOR.fields} == names | input_only


def test_all_violations_are_named() -> None:
    request = g.GenerateRequest(
        text="hi",
        sampling=g.Sampling(top_p=2, temperature=float("nan")),
        stopping=g.Stopping(stop=["ok", ""]),
        logprobs=99,
    )
    fields = [field for field, _ in _refused(lambda: _turn(request))]
    assert sorted(fields) == ["logprobs", "sampling.temperature", "sampling.top_p", "stopping.stop[1]"]


def test_violations_do_not_quote_the_prompt() -> None:
    secret = "my prompt"
    for request in (
        g.GenerateRequest(messages=chat((99, secret))),
        g.GenerateRequest(messages=chat((ASSISTANT, secret))),
        g.GenerateRequest(text=secret, stopping=g.Stopping(stop=[secret * 100])),
    ):
        assert secret not in str(_refused(lambda request=request: _turn(request)))


@pytest.mark.parametrize("letter", ["x", "\n", "🐝"])
def test_violations_do_not_repeat_long_names(letter: str) -> None:
    long = letter * 2**20
    labels = s.CreateSessionRequest(session=s.Session(labels={long: "x", "y" + long: long, "z": long}))
    mask = s.UpdateSessionRequest(
        session=s.Session(name="sessions/a"), update_mask=FieldMask(paths=[long] * 3)
    )
    for call in (lambda: incoming.new_session(labels), lambda: incoming.change(mask)):
        for field, why in _refused(call):
            assert len(field) < 120
            assert len(why) < 200
    assert (f"session.labels[{letter * 80}…]") in dict(_refused(lambda: incoming.new_session(labels)))


@pytest.mark.parametrize(
    "message",
    [
        g.GenerateRequest(text="x", sampling=g.Sampling(logit_bias=dict.fromkeys(range(9999), 1000000000.0))),
        g.GenerateRequest(text="x", stopping=g.Stopping(stop=["x" * 257] * 9999)),
        g.GenerateRequest(text="x", stopping=g.Stopping(stop_token_ids=[2**31] * 9999)),
        g.GenerateRequest(messages=g.ChatMessages(messages=[g.ChatMessage(role=9)] * 9999)),  # type: ignore[arg-type]
        g.GenerateRequest(token_ids=g.TokenIds(ids=[2**31] * 9999)),
        s.CreateSessionRequest(session=s.Session(labels={f"{id}" + "x" * 64: "x" for id in range(9999)})),
    ],
)
def test_a_violation_is_not_named_ten_thousand_times(
    message: g.GenerateRequest | s.CreateSessionRequest,
) -> None:
    if isinstance(message, s.CreateSessionRequest):
        assert len(_refused(lambda: incoming.new_session(message))) == 1
    else:
        assert len(_refused(lambda: incoming.turn_request(message, Caller(), longest=9999))) == 1


def test_a_turn_that_may_be_asked_for_again() -> None:
    message = g.GenerateRequest(text="hi", session="sessions/a", request_id="x", next_index=3)
    message.on_cancel, message.when_busy = g.ON_CANCEL_KEEP, g.WHEN_BUSY_WAIT
    turn = _turn(message)
    assert (turn.request_id, turn.next_index, turn.keep, turn.wait) == ("x", 3, True, True)
    plain = _turn(g.GenerateRequest(text="hi", session="sessions/a"))
    assert (plain.request_id, plain.next_index, plain.keep, plain.wait) == (None, 0, False, False)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("request_id", g.GenerateRequest(text="hi", request_id="x")),
        ("request_id", g.GenerateRequest(text="hi", session="sessions/a", request_id="x" * 129)),
        ("next_index", g.GenerateRequest(text="hi", session="sessions/a", next_index=3)),
    ],
)
def test_request_ids_that_name_nothing(field: str, message: g.GenerateRequest) -> None:
    assert [name for name, _ in _refused(lambda: _turn(message))] == [field]


def test_the_longest_input() -> None:
    assert len(_turn(g.GenerateRequest(token_ids=g.TokenIds(ids=range(10)))).input.ids) == 10
    ((field, why),) = _refused(lambda: _turn(g.GenerateRequest(token_ids=g.TokenIds(ids=range(11)))))
    assert field == "token_ids.ids"
    assert "11" in why
    assert "10" in why


def test_a_new_session() -> None:
    new = incoming.new_session(
        s.CreateSessionRequest(
            session_id="a",
            session=s.Session(policy="buzz", ttl=Duration(seconds=1, nanos=500_000_000), labels={"k": ""}),
        )
    )
    assert new == NewSession(id="a", policy="buzz", ttl=1.5, labels={"k": ""})
    end = Timestamp(seconds=int(time.time()) + 60)
    assert incoming.new_session(
        s.CreateSessionRequest(session=s.Session(expire_time=end))
    ).expire_time == float(end.seconds)
    assert incoming.new_session(s.CreateSessionRequest()) == NewSession()


def test_every_field_of_a_session_is_read_or_refused() -> None:
    ours = set(NewSession.model_fields) - {"id"}
    fields = {field.name for field in s.Session.DESCRIPTOR.fields}
    assert fields == ours | {"name"} | set(incoming._SESSION_OUTPUT)


@pytest.mark.parametrize(
    ("mask", "given", "changed"),
    [
        ([], {"policy": "full"}, {"policy": "full"}),
        ([], {"labels": {"a": "b"}, "ttl": Duration(seconds=9)}, {"labels": {"a": "b"}, "ttl": 9.0}),
        (["ttl"], {"ttl": Duration(seconds=9), "policy": "full"}, {"ttl": 9.0}),
        (["labels", "policy", "labels"], {"policy": "full"}, {"labels": {}, "policy": "full"}),
        (["*"], {"policy": "full"}, {"labels": {}, "policy": "full"}),
        (["*"], {"labels": {"a": "b"}}, {"labels": {"a": "b"}}),
        (["*"], {}, {"labels": {}}),
    ],
)
def test_what_a_mask_changes(mask: list[str], given: dict[str, Any], changed: dict[str, object]) -> None:
    session = s.Session(name="sessions/a", **given)
    message = s.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=mask))
    assert incoming.change(message) == ("a", SessionChange(**changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "wrong"),
    [
        (["*", "labels"], ["update_mask"]),
        (["labels", "name"], ["update_mask"]),
        (["policy", "ttl", "ttl"], ["session.policy", "session.ttl"]),
    ],
)
def test_masks_that_are_refused(mask: list[str], wrong: list[str]) -> None:
    session = s.Session(name="sessions/a", labels={"a": "b"})
    message = s.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=mask))
    assert [field for field, _ in _refused(lambda: incoming.change(message))] == wrong


def test_the_longest_life() -> None:
    at = Duration(seconds=int(LONGEST_LIFE))
    assert incoming.new_session(s.CreateSessionRequest(session=s.Session(ttl=at))).ttl == LONGEST_LIFE


@pytest.mark.parametrize(("asked", "given"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
def test_page_size(asked: int, given: int) -> None:
    assert incoming.page(s.ListSessionsRequest(page_size=asked)) == (given, "")


@pytest.mark.parametrize("id", ["a", "a" * 62, "a" * 63, "0-_."])
def test_a_page_token_comes_back(id: str) -> None:
    token = outgoing.sessions([], id).next_page_token
    assert incoming.page(s.ListSessionsRequest(page_token=token)) == (50, id)


def test_paths_below_a_field() -> None:
    with pytest.raises(InvalidField) as caught, incoming.below("session"):
        raise InvalidField([("policy", "no such"), ("labels[a]", "too long")])
    assert caught.value.violations == [("session.policy", "no such"), ("session.labels[a]", "too long")]


def test_model_names() -> None:
    for name in ("", "models/fake"):
        incoming.check_model_name(m.GetModelRequest(name=name), MODEL)
    with pytest.raises(ModelNotFound) as caught:
        incoming.check_model_name(m.GetModelRequest(name="models/org/other"), MODEL)
    assert caught.value.resource == "models/org/other"
    assert _refused(lambda: incoming.check_model_name(m.GetModelRequest(name="fake"), MODEL))
