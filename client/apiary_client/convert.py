"""The sole place where protobuf and the client's dataclasses meet; both clients share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from apiary.v1 import generation_pb2 as generation_pb
from apiary.v1 import model_pb2 as model_pb
from apiary.v1 import session_pb2 as session_pb
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
    CacheUsage,
    Capacity,
    Chat,
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
    Usage,
    WhenBusy,
)

_ROLES = {
    "system": generation_pb.ChatMessage.ROLE_SYSTEM,
    "user": generation_pb.ChatMessage.ROLE_USER,
    "assistant": generation_pb.ChatMessage.ROLE_ASSISTANT,
}
_ON_CANCEL = {
    OnCancel.DISCARD: generation_pb.ON_CANCEL_DISCARD,
    OnCancel.KEEP: generation_pb.ON_CANCEL_KEEP,
}
_WHEN_BUSY = {
    WhenBusy.REJECT: generation_pb.WHEN_BUSY_REJECT,
    WhenBusy.WAIT: generation_pb.WHEN_BUSY_WAIT,
}
_FINISH_REASONS = {
    generation_pb.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_REBUILD_REASONS = {
    generation_pb.Usage.REBUILD_REASON_SNAPSHOT_CORRUPT: RebuildReason.SNAPSHOT_CORRUPT,
    generation_pb.Usage.REBUILD_REASON_MODEL_CHANGED: RebuildReason.MODEL_CHANGED,
    generation_pb.Usage.REBUILD_REASON_POLICY_CHANGED: RebuildReason.POLICY_CHANGED,
    generation_pb.Usage.REBUILD_REASON_REWOUND: RebuildReason.REWOUND,
    generation_pb.Usage.REBUILD_REASON_RESTARTED: RebuildReason.RESTARTED,
    generation_pb.Usage.REBUILD_REASON_SNAPSHOT_EVICTED: RebuildReason.SNAPSHOT_EVICTED,
}
_STATES = {
    session_pb.Session.STATE_EMPTY: State.EMPTY,
    session_pb.Session.STATE_RESIDENT: State.RESIDENT,
    session_pb.Session.STATE_PARKED: State.PARKED,
    session_pb.Session.STATE_BUSY: State.BUSY,
    session_pb.Session.STATE_STORED: State.STORED,
}
_KINDS = {
    session_pb.CacheMap.KIND_SINK: EntryKind.SINK,
    session_pb.CacheMap.KIND_SAMPLED: EntryKind.SAMPLED,
    session_pb.CacheMap.KIND_CELL: EntryKind.CELL,
    session_pb.CacheMap.KIND_HEAVY: EntryKind.HEAVY,
    session_pb.CacheMap.KIND_MIDDLE: EntryKind.MIDDLE,
    session_pb.CacheMap.KIND_WINDOW: EntryKind.WINDOW,
    session_pb.CacheMap.KIND_PINNED: EntryKind.PINNED,
}


# ---- to protobuf


def session_name(session: Session | str) -> str:
    """Return the full name `sessions/{id}` of a session, its name or its id."""
    name = session.name if isinstance(session, Session) else session
    return name if name.startswith("sessions/") else f"sessions/{name}"


def generate_request(
    messages: Chat | None,
    *,
    text: str | None = None,
    token_ids: Sequence[int] | None = None,
    session: Session | str | None = None,
    sampling: Sampling | None = None,
    stopping: Stopping | None = None,
    policy: str | None = None,
    logprobs: int | None = None,
    priority: int = 0,
    request_id: str | None = None,
    next_index: int = 0,
    on_cancel: OnCancel | None = None,
    when_busy: WhenBusy | None = None,
) -> generation_pb.GenerateRequest:
    """Build a turn from one of `messages`, `text` and `token_ids`; the rest is `TurnOptions`.

    Raises:
        ValueError: no input or several, an unknown role, or a number that its field cannot carry.
    """
    _exactly_one(messages=messages, text=text, token_ids=token_ids)
    request = generation_pb.GenerateRequest(
        messages=_chat(messages),
        token_ids=None if token_ids is None else generation_pb.TokenIds(ids=token_ids),
        session="" if session is None else session_name(session),
        sampling=None if sampling is None else _sampling(sampling),
        stopping=None if stopping is None else _stopping(stopping),
        policy=policy or "",
        logprobs=logprobs,
        priority=priority,
        request_id=request_id or "",
        next_index=next_index,
        on_cancel=_ON_CANCEL[on_cancel] if on_cancel else generation_pb.ON_CANCEL_UNSPECIFIED,
        when_busy=_WHEN_BUSY[when_busy] if when_busy else generation_pb.WHEN_BUSY_UNSPECIFIED,
    )
    if text is not None:
        request.text = text
    return request


def tokenize_request(messages: Chat | None, text: str | None) -> generation_pb.TokenizeRequest:
    """Build the request for the token ids of `messages` or `text`.

    Raises:
        ValueError: neither or both are given, or a role is unknown.
    """
    _exactly_one(messages=messages, text=text)
    request = generation_pb.TokenizeRequest(messages=_chat(messages))
    if text is not None:
        request.text = text
    return request


def create_session_request(
    session_id: str,
    policy: str | None,
    ttl: float | timedelta | None,
    expire_time: datetime | None,
    labels: Mapping[str, str] | None,
) -> session_pb.CreateSessionRequest:
    """Build the request for a new session; `ttl` in seconds.

    Raises:
        ValueError: both `ttl` and `expire_time` are given, or `expire_time` has no time zone.
    """
    settings = _session_settings(policy, ttl, expire_time, labels)
    return session_pb.CreateSessionRequest(session_id=session_id, session=settings)


def import_session_requests(
    chunks: Iterable[bytes], session_id: str
) -> Iterator[session_pb.ImportSessionRequest]:
    """Messages that add a session; the first has its id."""
    for chunk in chunks:
        yield session_pb.ImportSessionRequest(session_id=session_id, chunk=chunk)
        session_id = ""


def update_session_request(
    name: str,
    policy: str | None,
    ttl: float | timedelta | None,
    expire_time: datetime | None,
    labels: Mapping[str, str] | None,
) -> session_pb.UpdateSessionRequest:
    """Build the request that changes what is not None.

    Raises:
        ValueError: as in `create_session_request`, or everything is None.
    """
    given = {"policy": policy, "ttl": ttl, "expire_time": expire_time, "labels": labels}
    paths = [path for path, value in given.items() if value is not None]
    if not paths:
        raise ValueError(f"nothing to change: give one of {', '.join(given)}")
    settings = _session_settings(policy, ttl, expire_time, labels)
    settings.name = name
    return session_pb.UpdateSessionRequest(session=settings, update_mask=FieldMask(paths=paths))


def cache_map_request(
    name: str, full: bool, layers: Sequence[int], column_count: int, token_limit: int
) -> session_pb.GetCacheMapRequest:
    """Build the request for the map of a session's cache.

    Raises:
        ValueError: a number that its field cannot carry.
    """
    view = session_pb.GetCacheMapRequest
    return view(
        name=name,
        view=view.VIEW_FULL if full else view.VIEW_SUMMARY,
        layers=layers,
        column_count=column_count,
        token_limit=token_limit,
    )


def _session_settings(
    policy: str | None,
    ttl: float | timedelta | None,
    expire_time: datetime | None,
    labels: Mapping[str, str] | None,
) -> session_pb.Session:
    if ttl is not None and expire_time is not None:
        raise ValueError("give ttl or expire_time, not both")
    if expire_time is not None and expire_time.tzinfo is None:
        raise ValueError(f"expire_time {expire_time} needs a time zone, for example datetime.now(UTC)")
    settings = session_pb.Session(policy=policy or "", labels=labels)
    if ttl is not None:
        settings.ttl.FromTimedelta(ttl if isinstance(ttl, timedelta) else timedelta(seconds=ttl))
    if expire_time is not None:
        settings.expire_time.FromDatetime(expire_time)
    return settings


def _exactly_one(**inputs: object) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(inputs)}; got {' and '.join(given) or 'none'}")


def _chat(chat: Chat | None) -> generation_pb.ChatMessages | None:
    if chat is None:
        return None
    if isinstance(chat, str):
        chat = Message("user", chat)
    messages = [chat] if isinstance(chat, Message) else chat
    return generation_pb.ChatMessages(messages=[_message(message) for message in messages])


def _message(message: Message) -> generation_pb.ChatMessage:
    if not isinstance(message, Message):
        raise TypeError(f"a message is a Message('user', 'Hello!'), not a {type(message).__name__}")
    if message.role not in _ROLES:
        raise ValueError(f"role {message.role!r} is none of {', '.join(_ROLES)}")
    return generation_pb.ChatMessage(role=_ROLES[message.role], content=message.content)


def _sampling(sampling: Sampling) -> generation_pb.Sampling:
    return generation_pb.Sampling(**{item.name: getattr(sampling, item.name) for item in fields(sampling)})


def _stopping(stopping: Stopping) -> generation_pb.Stopping:
    values = {item.name: getattr(stopping, item.name) for item in fields(stopping)}
    if isinstance(stopping.stop, str):  # one stop string, not its letters
        values["stop"] = (stopping.stop,)
    return generation_pb.Stopping(**values)


# ---- from protobuf


def delta(response: generation_pb.StreamGenerateResponse) -> Delta:
    """Return one piece of a streamed answer."""
    return Delta(
        text=response.text,
        token_ids=tuple(response.token_ids),
        index=response.index,
        logprobs=_logprobs(response.logprobs),
        finish_reason=_finish_reason(response.finish_reason) if response.finish_reason else None,
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def completion(response: generation_pb.GenerateResponse) -> Completion:
    """Return a whole answer."""
    return Completion(
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=_logprobs(response.logprobs),
        finish_reason=_finish_reason(response.finish_reason),
        usage=_usage(response.usage),
        index=response.index,
    )


def session(response: session_pb.Session) -> Session:
    """Return a session."""
    cache = response.cache
    return Session(
        name=response.name,
        policy=response.policy,
        state=_STATES.get(response.state, State.UNKNOWN),
        turn_count=response.turn_count,
        token_count=response.token_count,
        cache=CacheUsage(entries=cache.entries, bound=cache.bound, bytes=cache.bytes),
        labels=dict(response.labels),
        create_time=_time(response.create_time) if response.HasField("create_time") else None,
        update_time=_time(response.update_time) if response.HasField("update_time") else None,
        expire_time=_time(response.expire_time) if response.HasField("expire_time") else None,
    )


def cache_map(response: session_pb.CacheMap) -> CacheMap:
    """Return the map of a session's cache."""
    return CacheMap(
        name=response.name,
        state=_STATES.get(response.state, State.UNKNOWN),
        policy=response.policy,
        entries=response.entries,
        kv_heads=response.kv_heads,
        token_count=response.token_count,
        columns=tuple(
            MapColumn(column.start, column.stop, _kind(column.kind) if column.kind else None)
            for column in response.columns
        ),
        layers=tuple(
            LayerMap(
                layer=layer.layer,
                kinds=tuple(KindCount(_kind(count.kind), count.entries) for count in layer.kinds),
                column_entries=tuple(layer.column_entries),
                heads=tuple(
                    HeadMap(tuple(head.positions), tuple(head.scores), tuple(map(_kind, head.kinds)))
                    for head in layer.heads
                ),
            )
            for layer in response.layers
        ),
        kept_token_count=response.kept_token_count,
        tokens=tuple(
            KeptToken(
                position=token.position,
                token_id=token.token_id,
                text=token.text,
                head_count=token.head_count,
                mean_score=token.mean_score if token.HasField("mean_score") else None,
                kinds=tuple(map(_kind, token.kinds)),
            )
            for token in response.tokens
        ),
    )


def model(response: model_pb.Model) -> Model:
    """Return a served model."""
    same: dict[str, Any] = {item.name: getattr(response, item.name) for item in fields(Model)}
    return Model(**same | {"eos_token_ids": tuple(response.eos_token_ids)})


def capacity(response: model_pb.Capacity) -> Capacity:
    """Return a worker's capacity."""
    return Capacity(**{item.name: getattr(response, item.name) for item in fields(Capacity)})


def _kind(number: session_pb.CacheMap.Kind.ValueType) -> EntryKind:
    return _KINDS.get(number, EntryKind.UNKNOWN)


def _finish_reason(number: generation_pb.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS.get(number, FinishReason.UNKNOWN)


def _logprobs(logprobs: Iterable[generation_pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(item.token_id, item.logprob, tuple(TopLogprob(t.token_id, t.logprob) for t in item.top))
        for item in logprobs
    )


def _usage(usage: generation_pb.Usage) -> Usage:
    reason = usage.rebuild_reason
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        evicted_entries=usage.evicted_entries,
        queue_time=_seconds(usage.queue_time),
        prefill_time=_seconds(usage.prefill_time),
        decode_time=_seconds(usage.decode_time),
        seed=usage.seed,
        rebuild_reason=_REBUILD_REASONS.get(reason, RebuildReason.UNKNOWN) if reason else None,
        durable=usage.durable,
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
