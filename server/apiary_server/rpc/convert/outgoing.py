"""Responses: the domain's plain data become protobuf messages."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from apiary.v1 import generation_pb2 as gpb
from apiary.v1 import model_pb2 as mpb
from apiary.v1 import session_pb2 as spb
from apiary_server.engine.cache_map import CacheMap, Kind, LayerMap
from apiary_server.engine.result import Capacity, Delta, FinishReason, ModelInfo, TokenLogprob, Usage
from apiary_server.sessions.info import RebuildReason, SessionInfo, State

CHUNK = 2**20  # bytes of a session in a message

_STATES = {
    State.EMPTY: spb.Session.STATE_EMPTY,
    State.STORED: spb.Session.STATE_STORED,
    State.RESIDENT: spb.Session.STATE_RESIDENT,
    State.PARKED: spb.Session.STATE_PARKED,
    State.BUSY: spb.Session.STATE_BUSY,
}
_FINISH_REASONS = {
    None: gpb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: gpb.FINISH_REASON_STOP,
    FinishReason.LENGTH: gpb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: gpb.FINISH_REASON_CANCELLED,
}

_REBUILD_REASONS = {
    None: gpb.Usage.REBUILD_REASON_UNSPECIFIED,
    RebuildReason.SNAPSHOT_CORRUPT: gpb.Usage.REBUILD_REASON_SNAPSHOT_CORRUPT,
    RebuildReason.MODEL_CHANGED: gpb.Usage.REBUILD_REASON_MODEL_CHANGED,
    RebuildReason.POLICY_CHANGED: gpb.Usage.REBUILD_REASON_POLICY_CHANGED,
    RebuildReason.REWOUND: gpb.Usage.REBUILD_REASON_REWOUND,
    RebuildReason.RESTARTED: gpb.Usage.REBUILD_REASON_RESTARTED,
    RebuildReason.SNAPSHOT_EVICTED: gpb.Usage.REBUILD_REASON_SNAPSHOT_EVICTED,
}

_KINDS = {
    None: spb.CacheMap.KIND_UNSPECIFIED,
    Kind.SINK: spb.CacheMap.KIND_SINK,
    Kind.SAMPLED: spb.CacheMap.KIND_SAMPLED,
    Kind.CELL: spb.CacheMap.KIND_CELL,
    Kind.HEAVY: spb.CacheMap.KIND_HEAVY,
    Kind.PINNED: spb.CacheMap.KIND_PINNED,
    Kind.MIDDLE: spb.CacheMap.KIND_MIDDLE,
    Kind.WINDOW: spb.CacheMap.KIND_WINDOW,
}


def stream_response(delta: Delta) -> gpb.StreamGenerateResponse:
    """A piece of an answer."""
    return gpb.StreamGenerateResponse(
        text=delta.text,
        token_ids=delta.token_ids,
        index=delta.index,
        logprobs=map(_logprob, delta.logprobs),
        finish_reason=_FINISH_REASONS[delta.finish_reason],
        usage=None if delta.usage is None else _usage(delta.usage),
    )


def response(whole: Delta) -> gpb.GenerateResponse:
    """A whole answer: all of its deltas, merged."""
    return gpb.GenerateResponse(
        text=whole.text,
        token_ids=whole.token_ids,
        logprobs=map(_logprob, whole.logprobs),
        finish_reason=_FINISH_REASONS[whole.finish_reason],
        usage=None if whole.usage is None else _usage(whole.usage),
        index=whole.index,
    )


def session(info: SessionInfo) -> spb.Session:
    """A session as it is now."""
    return spb.Session(
        name=f"sessions/{info.id}",
        policy=info.policy,
        create_time=_timestamp(info.create_time),
        update_time=_timestamp(info.update_time),
        expire_time=_timestamp(info.expire_time),
        labels=dict(info.labels),
        state=_STATES[info.state],
        turn_count=info.turn_count,
        token_count=info.token_count,
        cache=spb.CacheUsage(entries=info.entries, bound=info.bound, bytes=info.bytes),
    )


def sessions(page: Iterable[SessionInfo], last: str) -> spb.ListSessionsResponse:
    """A page of sessions; `last` is the id that the next page comes after, "" if there is none."""
    token = base64.urlsafe_b64encode(last.encode("ascii")).decode("ascii")
    return spb.ListSessionsResponse(sessions=map(session, page), next_page_token=token)


def export(parts: Sequence[bytes]) -> Iterator[spb.ExportSessionResponse]:
    """The bytes of a session, in messages of a size that every client takes."""
    total = sum(map(len, parts))
    for part in parts:
        for start in range(0, len(part), CHUNK):
            yield spb.ExportSessionResponse(chunk=part[start : start + CHUNK], total_bytes=total)
            total = 0


def cache_map(drawn: CacheMap) -> spb.CacheMap:
    """Which tokens a session's cache keeps."""
    counts = [
        spb.KindCount(kind=_KINDS[region.kind], entries=(region.stop - region.start) * drawn.kv_heads)
        for region in drawn.regions
    ]
    kinds = [_KINDS[region.kind] for region in drawn.regions for _ in range(region.start, region.stop)]
    return spb.CacheMap(
        name=f"sessions/{drawn.id}",
        layers=[
            spb.LayerMap(
                heads=_heads(layer, kinds),
                layer=layer.layer,
                kinds=counts,
                column_entries=layer.column_entries.tolist(),
            )
            for layer in drawn.layers
        ],
        state=_STATES[drawn.state],
        policy=drawn.policy,
        entries=drawn.entries,
        kv_heads=drawn.kv_heads,
        token_count=drawn.seen,
        columns=[
            spb.MapColumn(start=column.start, stop=column.stop, kind=_KINDS[column.kind])
            for column in drawn.columns
        ],
        kept_token_count=drawn.kept,
        tokens=[
            spb.KeptToken(
                position=token.position,
                token_id=token.token_id,
                text=token.text,
                head_count=token.head_count,
                mean_score=token.mean_score,
                kinds=[_KINDS[kind] for kind in token.kinds],
            )
            for token in drawn.tokens
        ],
    )


def _heads(layer: LayerMap, kinds: Sequence[spb.CacheMap.Kind.ValueType]) -> list[spb.HeadMap]:
    if layer.positions is None:
        return []
    scores = [[]] * len(layer.positions) if layer.scores is None else layer.scores.tolist()
    return [
        spb.HeadMap(positions=positions, scores=some, kinds=kinds)
        for positions, some in zip(layer.positions.tolist(), scores, strict=True)
    ]


def model(info: ModelInfo) -> mpb.Model:
    """The served model and its limits."""
    return mpb.Model(**{**dataclasses.asdict(info), "name": model_name(info)})


def model_name(info: ModelInfo) -> str:
    """The served model's resource name, `models/{id}`."""
    return f"models/{info.name}"


def capacity(now: Capacity) -> mpb.Capacity:
    """Budgets and what is in use."""
    return mpb.Capacity(**dataclasses.asdict(now))


def _usage(usage: Usage) -> gpb.Usage:
    return gpb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        evicted_entries=usage.evicted_entries,
        queue_time=_duration(usage.queue_time),
        prefill_time=_duration(usage.prefill_time),
        decode_time=_duration(usage.decode_time),
        rebuild_reason=_REBUILD_REASONS[usage.rebuild_reason],
        durable=usage.durable,
        seed=usage.seed,
    )


def _logprob(one: TokenLogprob) -> gpb.TokenLogprob:
    return gpb.TokenLogprob(
        token_id=one.token_id,
        logprob=one.logprob,
        top=[gpb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in one.top],
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration
