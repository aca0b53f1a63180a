"""Requests as large as they may be, as data: every worker with an idle session `sessions/known` must
serve them."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from apiary.v1 import generation_pb2 as g
from apiary.v1 import session_pb2 as s

from .bad_requests import CREATE, GENERATE, LIST, MAP, STREAM, YEARS, turn

AT_LIMIT: dict[str, tuple[str, Message]] = {
    "sampling, high": (
        STREAM,
        turn(
            sampling=g.Sampling(
                temperature=10,
                top_k=2**31 - 1,
                top_p=1,
                min_p=1,
                repetition_penalty=10,
                presence_penalty=2,
                frequency_penalty=2,
                logit_bias={token: 100 if token % 2 else -100 for token in range(1024)},
                seed=2**64 - 1,
            )
        ),
    ),
    "sampling, low": (
        STREAM,
        turn(
            sampling=g.Sampling(
                temperature=0,
                top_k=0,
                top_p=1e-6,
                min_p=0,
                repetition_penalty=1e-3,
                presence_penalty=-2,
                frequency_penalty=-2,
                seed=0,
            )
        ),
    ),
    "stopping": (
        STREAM,
        turn(
            stopping=g.Stopping(
                max_tokens=1, stop=["é" * 256] * 16, stop_token_ids=range(64), ignore_eos=True
            )
        ),
    ),
    "logprobs and priority": (GENERATE, turn(logprobs=20, priority=100)),
    "no alternatives, low priority": (GENERATE, turn(logprobs=0, priority=-100)),
    "said defaults": (
        GENERATE,
        turn(on_cancel=g.ON_CANCEL_DISCARD, when_busy=g.WHEN_BUSY_REJECT),
    ),
    "session id": (CREATE, s.CreateSessionRequest(session_id="a" + "-_." * 20 + "z9")),
    "labels": (
        CREATE,
        s.CreateSessionRequest(session=s.Session(labels={f"{i:063}": "x" * 256 for i in range(64)})),
    ),
    "longest ttl": (CREATE, s.CreateSessionRequest(session=s.Session(ttl=Duration(seconds=YEARS)))),
    "shortest ttl": (CREATE, s.CreateSessionRequest(session=s.Session(ttl=Duration(nanos=1_000_000)))),
    "map": (MAP, s.GetCacheMapRequest(name="sessions/known", column_count=512, token_limit=1000)),
    "page size": (LIST, s.ListSessionsRequest(page_size=2**31 - 1)),
}
