"""Requests: protobuf messages become the domain's models.

Limits are declared on those models (`engine/request.py`, `sessions/request.py`); what they refuse becomes
`InvalidField` with the protobuf path of each field.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Protobuf
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ValidationError

from apiary.v1 import generation_pb2 as gpb
from apiary.v1 import model_pb2 as mpb
from apiary.v1 import session_pb2 as spb
from apiary_server.engine.request import MOST_LAYERS, CacheMapRequest, Messages, Text, TokenIds, TurnRequest
from apiary_server.engine.result import ModelInfo
from apiary_server.errors import InvalidField, ModelNotFound
from apiary_server.rpc.caller import Caller
from apiary_server.rpc.convert.outgoing import model_name
from apiary_server.sessions.request import SESSION_ID, NewSession, SessionChange
from apiary_server.telemetry import Origin

DEFAULT_PAGE, LONGEST_PAGE = 50, 1000
_ECHO = 80  # characters of a caller's text that an error repeats
_ID_RULE = "1 to 63 of a-z, 0-9, '-', '_', '.', starting with a letter or digit"

_ROLES = {
    gpb.ChatMessage.ROLE_SYSTEM: "system",
    gpb.ChatMessage.ROLE_USER: "user",
    gpb.ChatMessage.ROLE_ASSISTANT: "assistant",
}
# Output only. The AIPs would have a server ignore them in a request; here nothing is ignored.
_SESSION_OUTPUT = ("create_time", "update_time", "state", "turn_count", "token_count", "cache")
_SETTINGS = ("policy", "expire_time", "ttl", "labels")

_Model = TypeVar("_Model", bound=BaseModel)


def turn_request(message: gpb.GenerateRequest, caller: Caller, longest: int) -> TurnRequest:
    """Build a turn; `longest` is the most tokens that its input may have.

    Raises:
        InvalidField: with the protobuf path of every field that is wrong.
    """
    match message.WhichOneof("input"):
        case "messages":
            given: Messages | Text | TokenIds = messages(message.messages)
        case "text":
            given = _build(Text, "", text=message.text)
        case "token_ids":
            given = token_ids(message.token_ids.ids, "token_ids.ids", longest)
        case _:
            raise InvalidField([("input", "is required: one of messages, text, token_ids")])
    if message.session and message.policy:
        raise InvalidField([("policy", "a session has its own: leave this field or the session empty")])
    if not message.session and (message.request_id or message.next_index):
        raise InvalidField([("request_id", "needs a session, which keeps the answer: name one")])
    if message.next_index and not message.request_id:
        raise InvalidField([("next_index", "needs the request_id of the answer that it is a place in")])
    _check_enum("on_cancel", message.on_cancel, gpb.OnCancel.values())
    _check_enum("when_busy", message.when_busy, gpb.WhenBusy.values())
    return _build(
        TurnRequest,
        "",
        input=given,
        session=session_id(message.session, "session") if message.session else None,
        tenant=caller.tenant,
        sampling=_fields(message.sampling),
        stopping=_fields(message.stopping),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        priority=message.priority,
        policy=message.policy or None,
        deadline=caller.deadline,
        request_id=message.request_id or None,
        next_index=message.next_index,
        keep=message.on_cancel == gpb.ON_CANCEL_KEEP,
        wait=message.when_busy == gpb.WHEN_BUSY_WAIT,
        trace=Origin("chat" if isinstance(given, Messages) else "text_completion", caller.trace_headers),
    )


def tokenize_input(message: gpb.TokenizeRequest) -> Text | Messages:
    """Build what is to be tokenised.

    Raises:
        InvalidField: with the protobuf path of every field that is wrong.
    """
    match message.WhichOneof("input"):
        case "messages":
            return messages(message.messages)
        case "text":
            return _build(Text, "", text=message.text)
    raise InvalidField([("input", "is required: one of text, messages")])


def messages(message: gpb.ChatMessages) -> Messages:
    """Build the messages of a turn: a system message comes first, a user's comes last.

    Raises:
        InvalidField: with the protobuf path of every message that is wrong.
    """
    turn = _build(
        Messages,
        "messages",
        messages=tuple({"role": _ROLES.get(one.role), "content": one.content} for one in message.messages),
    )
    wrong = []
    last = len(turn.messages) - 1
    for place, one in enumerate(turn.messages):
        path = f"messages.messages[{place}]"
        if not one.content:
            wrong.append((f"{path}.content", "must not be empty"))
        if one.role == "system" and place > 0:
            wrong.append((f"{path}.role", "a system message may only come first"))
        if one.role != "user" and place == last:
            wrong.append((f"{path}.role", "the last message must be the user's, since it is answered"))
    if wrong:
        raise InvalidField(wrong)
    return turn


def token_ids(ids: Sequence[int], field: str, longest: int) -> TokenIds:
    """Build token ids, at most `longest` of them.

    Raises:
        InvalidField: with paths at and below `field`.
    """
    if len(ids) > longest:  # before they are copied: millions of ids would hold the interpreter for long
        raise InvalidField([(field, f"has {len(ids)} tokens, at most {longest} are allowed")])
    return _build(TokenIds, field, skip=1, ids=tuple(ids))


def new_session(message: spb.CreateSessionRequest) -> NewSession:
    """Build a session to create.

    Raises:
        InvalidField: with the protobuf path of every field that is wrong, output-only fields included.
    """
    _refuse_output(message.session, ("name", *_SESSION_OUTPUT))
    settings = _settings(message.session, _SETTINGS)
    return _build(NewSession, "session", id=_new_id(message.session_id), **settings)


def change(message: spb.UpdateSessionRequest) -> tuple[str, SessionChange]:
    """The id of a session, and what to change of it: the fields of the mask, or without one those that are
    set (AIP-134). The mask `*` is those that are set and the labels, of which there may be none.

    Raises:
        InvalidField: with the protobuf path of every field that is wrong.
    """
    session = message.session
    id = session_id(session.name, "session.name")
    _refuse_output(session, _SESSION_OUTPUT)
    paths = list(dict.fromkeys(message.update_mask.paths))
    if paths == ["*"]:
        return id, _build(SessionChange, "session", **{"labels": {}, **_settings(session, _SETTINGS)})
    if unknown := [path for path in paths if path not in _SETTINGS]:
        why = f"has {_echo(', '.join(unknown))}; what can be changed is {', '.join(_SETTINGS)}"
        raise InvalidField([("update_mask", why)])
    settings = _settings(session, paths or _SETTINGS)
    if "labels" in paths:
        settings.setdefault("labels", {})
    if unset := [path for path in paths if path not in settings]:
        raise InvalidField([(f"session.{path}", "is in the update mask, and not set") for path in unset])
    if not settings:
        raise InvalidField([("session", f"names nothing to change: set one of {', '.join(_SETTINGS)}")])
    return id, _build(SessionChange, "session", **settings)


def fork(message: spb.ForkSessionRequest) -> tuple[str, str | None]:
    """The id of the session to copy, and of the copy (None: to be drawn).

    Raises:
        InvalidField: one of them is malformed.
    """
    return session_id(message.name, "name"), _new_id(message.session_id)


def imported(first: spb.ImportSessionRequest | None) -> str | None:
    """The id of the session that is to be added (None: to be drawn).

    Raises:
        InvalidField: nothing came, or it is malformed.
    """
    if first is None:
        raise InvalidField([("chunk", "is empty: send what an export gave")])
    return _new_id(first.session_id)


def imported_next(message: spb.ImportSessionRequest | None) -> None:
    """Check a message after the first.

    Raises:
        InvalidField: it has an id.
    """
    if message is not None and message.session_id:
        raise InvalidField([("session_id", "belongs in the first message alone")])


def cache_map(message: spb.GetCacheMapRequest) -> tuple[str, CacheMapRequest]:
    """The id of a session, and what to tell of its cache.

    Raises:
        InvalidField: with the protobuf path of every field that is wrong.
    """
    id = session_id(message.name, "name")
    _check_enum("view", message.view, spb.GetCacheMapRequest.View.values())
    full = message.view == spb.GetCacheMapRequest.VIEW_FULL
    if full and message.token_limit:
        raise InvalidField([("token_limit", "is for summaries: a full map has all tokens, so leave it out")])
    if len(message.layers) > MOST_LAYERS:  # before they are copied
        why = f"has {len(message.layers)} numbers, at most {MOST_LAYERS} are allowed"
        raise InvalidField([("layers", why)])
    given: dict[str, Any] = _fields(message)
    for name in ("name", "view"):
        given.pop(name, None)
    return id, _build(CacheMapRequest, "", full=full, **given)


def session_id(name: str, field: str) -> str:
    """The id in `sessions/{id}`.

    Raises:
        InvalidField: the name, found in `field`, does not have that shape.
    """
    last = name.removeprefix("sessions/")
    if last == name or not _is_session_id(last):
        raise InvalidField([(field, f"must be sessions/{{id}}, the id being {_ID_RULE}")])
    return last


def page(message: spb.ListSessionsRequest) -> tuple[int, str]:
    """The size of a page, and the id that it comes after ("" for the first). Sizes above 1,000 mean 1,000.

    Raises:
        InvalidField: a negative size, or a token that no page ended with.
    """
    if message.page_size < 0:
        raise InvalidField([("page_size", "must not be negative")])
    size = min(message.page_size or DEFAULT_PAGE, LONGEST_PAGE)
    if not message.page_token:
        return size, ""
    try:
        after = base64.b64decode(message.page_token, altchars=b"-_", validate=True).decode("ascii")
    except ValueError:
        after = ""
    if not _is_session_id(after):
        raise InvalidField([("page_token", "is not the next_page_token of a page")])
    return size, after


def check_model_name(message: mpb.GetModelRequest, info: ModelInfo) -> None:
    """Refuse a request for another model.

    Raises:
        InvalidField: the name does not have the shape `models/{id}`.
        ModelNotFound: this worker serves another one.
    """
    if message.name and not re.fullmatch(r"models/\S{1,256}", message.name):
        raise InvalidField([("name", "must be models/{id}, or empty for the served model")])
    if message.name and message.name != model_name(info):
        raise ModelNotFound(message.name, f"this worker serves {model_name(info)}")


@contextmanager
def below(parent: str) -> Iterator[None]:
    """The domain names its fields as a request does; in the message around this they lie below `parent`."""
    try:
        yield
    except InvalidField as error:
        raise InvalidField([(f"{parent}.{field}", why) for field, why in error.violations]) from None


def _build(kind: type[_Model], parent: str, *, skip: int = 0, **values: object) -> _Model:
    """Validate. A violation's path: `parent`, then its place in the model, less the first `skip` parts."""
    try:
        return kind(**values)
    except ValidationError as error:
        # never with the value: it may be a prompt
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidField(
            [(_path(parent, one["loc"][skip:]), one["msg"].removeprefix("Value error, ")) for one in problems]
        ) from None


def _path(parent: str, parts: Sequence[int | str]) -> str:
    path = parent
    for part in parts:
        if part == "[key]":  # pydantic's mark for a map's key; its value stands before
            continue
        if isinstance(part, int) or path.endswith("labels"):
            path += f"[{part if isinstance(part, int) else _echo(part)}]"
        else:
            path += f".{part}" if path else part
    return path


def _echo(text: str) -> str:
    """What an error repeats of a caller's text, which may be as long as a message."""
    return text if len(text) <= _ECHO else f"{text[:_ECHO]}…"


def _fields(message: Protobuf) -> dict[str, object]:
    """The fields that are set, by name. One that the domain model lacks is refused there."""
    values: dict[str, object] = {}
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:  # a map: the messages given to this have no other
            values[descriptor.name] = dict(value)
        else:
            values[descriptor.name] = tuple(value) if descriptor.is_repeated else value
    return values


def _check_enum(field: str, value: int, known: Sequence[int]) -> None:
    if value not in known:
        raise InvalidField([(field, f"has no value {value}")])


def _refuse_output(session: spb.Session, names: Sequence[str]) -> None:
    given = {descriptor.name for descriptor, _ in session.ListFields()}
    if wrong := [(f"session.{name}", "is output only") for name in names if name in given]:
        raise InvalidField(wrong)


def _settings(session: spb.Session, names: Sequence[str]) -> dict[str, Any]:
    """The settings that are set, of those named."""
    given: dict[str, Any] = {}
    for descriptor, value in session.ListFields():
        if descriptor.name not in names:
            continue
        if isinstance(value, Duration | Timestamp):
            value = _seconds(value, f"session.{descriptor.name}")
        given[descriptor.name] = dict(value) if descriptor.name == "labels" else value
    return given


def _new_id(text: str) -> str | None:
    if text and not _is_session_id(text):
        raise InvalidField([("session_id", f"must be {_ID_RULE}")])
    return text or None


def _is_session_id(text: str) -> bool:
    return re.fullmatch(SESSION_ID, text) is not None


def _seconds(value: Duration | Timestamp, field: str) -> float:
    try:
        value.ToJsonString()  # the only public check of a Duration's range and signs
    except ValueError as error:
        raise InvalidField([(field, str(error))]) from None
    return value.seconds + value.nanos / 1e9
