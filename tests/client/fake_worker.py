"""A worker without an engine: real gRPC, canned answers, and a memory of what it was asked.

A turn is answered with `turn {n}: {last message}`, one word a delta. The last message can ask for more:
`slow` streams until it is cancelled, `fail REASON` fails after its first word with that reason's details.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent import futures
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from apiary.v1 import generation_pb2, model_pb2, session_pb2
from apiary.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from apiary.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from apiary.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server

CREATED = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)

CODES = {
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "MALFORMED_MESSAGE": grpc.StatusCode.INVALID_ARGUMENT,
    "FIELD_NOT_IMPLEMENTED": grpc.StatusCode.UNIMPLEMENTED,
    "METHOD_NOT_IMPLEMENTED": grpc.StatusCode.UNIMPLEMENTED,
    "SESSION_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "SESSION_BUSY": grpc.StatusCode.FAILED_PRECONDITION,
    "CONTEXT_FULL": grpc.StatusCode.FAILED_PRECONDITION,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "BUDGET_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "READER_STALLED": grpc.StatusCode.ABORTED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "INTERNAL": grpc.StatusCode.INTERNAL,
    "SNAPSHOT_REFUSED": grpc.StatusCode.INVALID_ARGUMENT,
}


def status(reason: str, *, message: str = "", domain: str = "apiary") -> grpc.Status:
    """Return what a worker answers for a reason, with every kind of detail."""
    message = message or f"it was {reason}"
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.temperature", description="must be at most 10")
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    details = [
        error_details_pb2.ErrorInfo(domain=domain, reason=reason, metadata={"incident": "abc123"}),
        bad,
        error_details_pb2.ResourceInfo(resource_name="sessions/x"),
        retry,
    ]
    packed = []
    for detail in details:
        any_message = AnyMessage()
        any_message.Pack(detail)
        packed.append(any_message)
    code = CODES.get(reason, grpc.StatusCode.ABORTED)
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))


class FakeWorker(GenerationServiceServicer, SessionServiceServicer, ModelServiceServicer):
    """Serves on `target` until `stop`."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.sessions: dict[str, session_pb2.Session] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.calls: Counter[str] = Counter()
        self.asked = threading.Event()
        self.cancelled = threading.Event()
        self.fail_next: list[grpc.Status] = []
        self.capacity = model_pb2.Capacity(budget_bytes=2**30, used_bytes=2**20, queue_limit=256)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        add_GenerationServiceServicer_to_server(self, self._server)
        add_SessionServiceServicer_to_server(self, self._server)
        add_ModelServiceServicer_to_server(self, self._server)
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.target = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Cut all connections."""
        self._server.stop(0).wait(5)

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata()})
        self.calls[type(request).__name__] += 1
        self.asked.set()
        if self.fail_next:
            context.abort_with_status(self.fail_next.pop(0))

    # ---- generation

    def _answer(self, request: Any, context: grpc.ServicerContext) -> tuple[str, list[str]]:
        if request.session and request.session not in self.sessions:
            context.abort_with_status(status("SESSION_NOT_FOUND", message=f"no session {request.session!r}"))
        session = self.sessions.get(request.session, session_pb2.Session())
        kind = request.WhichOneof("input")
        if kind == "messages":
            text = request.messages.messages[-1].content
        else:
            text = request.text or str(list(request.token_ids.ids))
        return text, f"turn {session.turn_count + 1}: {text}".split(" ")

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        text, words = self._answer(request, context)
        if text.startswith("slow"):
            self._ended(context).wait(30)
        if text.startswith("fail "):
            context.abort_with_status(status(text.split()[1]))
        return generation_pb2.GenerateResponse(
            text=" ".join(words),
            token_ids=range(len(words)),
            logprobs=[_logprob()],
            finish_reason=generation_pb2.FINISH_REASON_LENGTH,
            usage=_usage(len(words)),
        )

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self._note(request, context)
        text, words = self._answer(request, context)
        ended = self._ended(context) if text.startswith("slow") else None
        for place, word in enumerate(words):
            yield generation_pb2.StreamGenerateResponse(
                text=word if place == 0 else f" {word}", token_ids=[place], index=place, logprobs=[_logprob()]
            )
            if text.startswith("fail "):
                context.abort_with_status(status(text.split()[1]))
        if ended is not None:
            ended.wait(30)
            return
        if request.session:
            self.sessions[request.session].turn_count += 1
        yield generation_pb2.StreamGenerateResponse(
            index=len(words), finish_reason=generation_pb2.FINISH_REASON_STOP, usage=_usage(len(words))
        )

    def _ended(self, context: grpc.ServicerContext) -> threading.Event:
        """An event that is set when the call is over; a slow one ends by cancellation only."""
        context.add_callback(self.cancelled.set)
        return self.cancelled

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        text = request.text or request.messages.messages[-1].content
        return generation_pb2.TokenizeResponse(token_ids=text.encode())

    def Detokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        return generation_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    # ---- sessions

    def CreateSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        name = f"sessions/{request.session_id or f'drawn-{len(self.sessions)}'}"
        if name in self.sessions:
            context.abort_with_status(status("SESSION_EXISTS", message=f"session {name!r} exists already"))
        session = session_pb2.Session(
            name=name, policy=request.session.policy or "buzz", labels=request.session.labels
        )
        session.state = session_pb2.Session.STATE_EMPTY
        session.create_time.FromDatetime(CREATED)
        session.expire_time.FromDatetime(CREATED + timedelta(days=1))
        session.cache.entries, session.cache.bound, session.cache.bytes = 10, 564, 2**20
        self.sessions[name] = session
        return session

    def _find(self, name: str, context: grpc.ServicerContext) -> Any:
        if name not in self.sessions:
            context.abort_with_status(status("SESSION_NOT_FOUND", message=f"no session {name!r}"))
        return self.sessions[name]

    def GetSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        return self._find(request.name, context)

    def ListSessions(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(session_pb2.ListSessionsRequest.FromString(request.SerializeToString()), context)
        size = request.page_size or 2
        names = sorted(self.sessions)
        start = int(request.page_token or 0)
        more = start + size < len(names)
        return session_pb2.ListSessionsResponse(
            sessions=[self.sessions[name] for name in names[start : start + size]],
            next_page_token=str(start + size) if more else "",
        )

    def UpdateSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        session = self._find(request.session.name, context)
        request.update_mask.MergeMessage(request.session, session, True, True)
        return session

    def ForkSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        forked = session_pb2.Session()
        forked.CopyFrom(self._find(request.name, context))
        forked.name = f"sessions/{request.session_id or 'drawn'}"
        self.sessions[forked.name] = forked
        return forked

    def RewindSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        session = self._find(request.name, context)
        session.turn_count = request.turn_count
        return session

    def ExportSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        self._find(request.name, context)
        for place, chunk in enumerate((b"one ", b"two ", b"three")):
            yield session_pb2.ExportSessionResponse(chunk=chunk, total_bytes=0 if place else 13)

    def ImportSession(self, requests: Any, context: grpc.ServicerContext) -> Any:
        whole = list(requests)
        self._note(whole[0], context)
        if b"".join(request.chunk for request in whole) != b"one two three":
            context.abort_with_status(status("SNAPSHOT_REFUSED"))
        assert not any(request.session_id for request in whole[1:])
        session = session_pb2.Session(name=f"sessions/{whole[0].session_id or 'drawn'}")
        self.sessions[session.name] = session
        return session

    def GetCacheMap(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        session = self._find(request.name, context)
        full = request.view == session_pb2.GetCacheMapRequest.VIEW_FULL
        drawn = cache_map(request.layers or range(3), request.column_count or 64, full=full)
        drawn.name, drawn.policy = session.name, session.policy
        if not session.turn_count:
            return session_pb2.CacheMap(name=session.name, policy=session.policy, state=session.state)
        return drawn

    def DeleteSession(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        self._find(request.name, context)
        del self.sessions[request.name]
        return Empty()

    # ---- model

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        return model_pb2.Model(name="models/fake", layers=30, eos_token_ids=[0, 2], chat=True)

    def GetCapacity(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(request, context)
        return self.capacity


TEXTS = ("<|im_start|>", "\u202e\x9b", " the\x1b[31m", "\n", " a", " [bold]", "\ufffd", " $x_", " é", '"')


def cache_map(layers: Sequence[int], columns: int, *, full: bool) -> session_pb2.CacheMap:
    """Two heads keep four of ten tokens each: a sink, two of the others, and the last one."""
    kinds = [session_pb2.CacheMap.KIND_SINK] + [session_pb2.CacheMap.KIND_CELL] * 2
    kinds.append(session_pb2.CacheMap.KIND_WINDOW)
    drawn = session_pb2.CacheMap(
        state=session_pb2.Session.STATE_RESIDENT, entries=4, kv_heads=2, token_count=10, kept_token_count=8
    )
    count = min(columns, 10)
    edges = [place * 10 // count for place in range(count + 1)]
    kept: dict[int, int] = {}
    for layer in layers:
        heads = [sorted({0, 1 + layer, 5 + head, 9}) for head in range(2)]
        positions = [position for head in heads for position in head]
        for position in positions:
            kept[position] = kept.get(position, 0) + 1
        drawn.layers.add(
            layer=layer,
            kinds=[
                session_pb2.KindCount(kind=kind, entries=entries)
                for kind, entries in zip((1, 3, 6), (2, 4, 2), strict=True)  # type: ignore[arg-type]
            ],
            column_entries=[
                sum(start <= position < stop for position in positions)
                for start, stop in itertools.pairwise(edges)
            ],
            heads=[
                session_pb2.HeadMap(positions=head, scores=[position / 2 for position in head], kinds=kinds)
                for head in heads
            ]
            if full
            else [],
        )
    for start, stop in itertools.pairwise(edges):
        some = [position for position in kept if start <= position < stop]
        kind = 0 if not some else 1 if 0 in some else 6 if 9 in some else 3
        drawn.columns.add(start=start, stop=stop, kind=kind)  # type: ignore[arg-type]
    for position, heads_keep in sorted(kept.items()):
        drawn.tokens.add(
            position=position,
            token_id=position + 100,
            text=TEXTS[position],
            head_count=heads_keep,
            mean_score=position / 2,
            kinds=[kinds[0] if position == 0 else kinds[-1] if position == 9 else kinds[1]],
        )
    return drawn


def _logprob() -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token_id=5, logprob=-0.5)]
    return generation_pb2.TokenLogprob(token_id=7, logprob=-1.5, top=top)


def _usage(tokens: int) -> generation_pb2.Usage:
    usage = generation_pb2.Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=tokens, seed=2**63)
    usage.queue_time.FromMilliseconds(250)
    usage.decode_time.FromMilliseconds(500)
    usage.rebuild_reason = generation_pb2.Usage.REBUILD_REASON_MODEL_CHANGED
    return usage
