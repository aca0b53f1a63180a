"""Malformed and absurd requests, as data: what to send, and what every worker must answer.

The worker has its default limits, and in the tenant `default` an idle session `sessions/known`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from apiary.v1 import generation_pb2 as g
from apiary.v1 import model_pb2 as m
from apiary.v1 import session_pb2 as s

GENERATE = "/apiary.v1.GenerationService/Generate"
STREAM = "/apiary.v1.GenerationService/StreamGenerate"
TOKENIZE = "/apiary.v1.GenerationService/Tokenize"
DETOKENIZE = "/apiary.v1.GenerationService/Detokenize"
CREATE = "/apiary.v1.SessionService/CreateSession"
GET = "/apiary.v1.SessionService/GetSession"
MAP = "/apiary.v1.SessionService/GetCacheMap"
LIST = "/apiary.v1.SessionService/ListSessions"
DELETE = "/apiary.v1.SessionService/DeleteSession"
MODEL = "/apiary.v1.ModelService/GetModel"
CAPACITY = "/apiary.v1.ModelService/GetCapacity"

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
NOT_FOUND = grpc.StatusCode.NOT_FOUND

YEARS = 10 * 365 * 86_400
NAN, INFINITY = float("nan"), float("inf")
USER, SYSTEM, ASSISTANT = g.ChatMessage.ROLE_USER, g.ChatMessage.ROLE_SYSTEM, g.ChatMessage.ROLE_ASSISTANT


@dataclass(frozen=True)
class BadRequest:
    """One request and its answer; a `field` of None leaves open which fields the answer names."""

    name: str
    method: str
    payload: bytes | Message
    field: str | None = None
    code: grpc.StatusCode = INVALID
    reason: str = "INVALID_FIELD"
    metadata: tuple[tuple[str, str | bytes], ...] = ()


def chat(*messages: tuple[int, str]) -> g.ChatMessages:
    """Chat messages of (role, content)."""
    return g.ChatMessages(messages=[g.ChatMessage(role=role, content=content) for role, content in messages])


def turn(**fields: Any) -> g.GenerateRequest:
    """A short turn with these fields."""
    if not {"text", "messages", "token_ids"} & fields.keys():
        fields["text"] = "hi"
    stopping = g.Stopping(max_tokens=1)
    stopping.MergeFrom(fields.pop("stopping", g.Stopping()))
    return g.GenerateRequest(stopping=stopping, **fields)


def _turns() -> Iterator[BadRequest]:
    def bad(name: str, field: str | None, /, method: str = STREAM, **fields: Any) -> BadRequest:
        return BadRequest(name, method, turn(**fields), field)

    for name, (value, beyond) in {
        "temperature": (-0.01, 10.1),
        "top_p": (0.0, 1.01),
        "min_p": (-0.01, 1.01),
        "repetition_penalty": (0.0, 10.1),
        "presence_penalty": (-2.1, 2.1),
        "frequency_penalty": (-2.1, 2.1),
    }.items():
        for label, number in {
            "below": value,
            "beyond": beyond,
            "NaN": NAN,
            "infinite": INFINITY,
            "-infinite": -INFINITY,
        }.items():
            yield bad(f"{name} {label}", f"sampling.{name}", sampling=g.Sampling(**{name: number}))
    yield bad("top_k beyond", "sampling.top_k", sampling=g.Sampling(top_k=2**31))
    biases = {1: 100.5, 2: NAN, 3: -INFINITY, 2**32 - 1: 1.0}
    for token, bias in biases.items():
        field = f"sampling.logit_bias[{token}]"
        yield bad(f"logit bias {token}: {bias}", field, sampling=g.Sampling(logit_bias={token: bias}))
    yield bad("logit bias of no token", None, sampling=g.Sampling(logit_bias={2**30: 1.0}))
    many = dict.fromkeys(range(1025), 1.0)
    yield bad("1,025 logit biases", "sampling.logit_bias", sampling=g.Sampling(logit_bias=many))

    yield bad("no tokens wanted", "stopping.max_tokens", stopping=g.Stopping(max_tokens=0))
    yield bad("too many tokens wanted", "stopping.max_tokens", stopping=g.Stopping(max_tokens=32_769))
    yield bad("max_tokens 2^32-1", "stopping.max_tokens", stopping=g.Stopping(max_tokens=2**32 - 1))
    yield bad("stop of 10 kB", "stopping.stop[0]", stopping=g.Stopping(stop=["x" * 10_000]))
    yield bad("stop of 257", "stopping.stop[1]", stopping=g.Stopping(stop=["x", "é" * 257]))
    yield bad("empty stop", "stopping.stop[0]", stopping=g.Stopping(stop=[""]))
    yield bad("17 stops", "stopping.stop", stopping=g.Stopping(stop=["x"] * 17))
    yield bad("65 stop tokens", "stopping.stop_token_ids", stopping=g.Stopping(stop_token_ids=range(65)))
    yield bad("stop token 2^31", "stopping.stop_token_ids[1]", stopping=g.Stopping(stop_token_ids=[1, 2**31]))
    yield bad("no such stop token", "stopping.stop_token_ids[0]", stopping=g.Stopping(stop_token_ids=[2**30]))

    yield bad("logprobs beyond", "logprobs", logprobs=21)
    yield bad("priority below", "priority", priority=-101)
    yield bad("priority beyond", "priority", priority=2**31 - 1)

    yield BadRequest("empty request", STREAM, b"", "input")
    yield BadRequest("empty request, unary", GENERATE, b"", "input")
    yield bad("empty text", "text", text="")
    yield bad("1 MiB of text", "text", text="a b " * 2**18)
    yield bad("1 MiB of text, unary", "text", method=GENERATE, text="a b " * 2**18)
    yield bad("no messages", "messages.messages", messages=chat())
    yield bad("1,025 messages", "messages.messages", messages=chat(*[(USER, "x")] * 1025))
    yield bad("empty content", "messages.messages[0].content", messages=chat((USER, "")))
    yield bad("no role", "messages.messages[1].role", messages=chat((USER, "x"), (0, "x")))
    yield bad("unknown role", "messages.messages[0].role", messages=chat((77, "x")))
    yield bad(
        "late system", "messages.messages[1].role", messages=chat((USER, "x"), (SYSTEM, "x"), (USER, "x"))
    )
    yield bad("system only", "messages.messages[0].role", messages=chat((SYSTEM, "x")))
    yield bad("assistant last", "messages.messages[1].role", messages=chat((USER, "x"), (ASSISTANT, "x")))
    yield bad("no token ids", "token_ids.ids", token_ids=g.TokenIds())
    yield bad("token id 2^32-1", "token_ids.ids[1]", token_ids=g.TokenIds(ids=[1, 2**32 - 1]))
    yield bad("no such token", "token_ids.ids[3]", token_ids=g.TokenIds(ids=[1, 2, 3, 2**30]))
    yield bad("131,073 token ids", "token_ids.ids", token_ids=g.TokenIds(ids=[1] * 131_073))
    yield bad("millions of token ids", "token_ids.ids", token_ids=g.TokenIds(ids=[1] * (7 * 2**20)))

    for name in ("known", "sessions/", "sessions/a/b", "sessions/Known", "sessions/-a", "models/known"):
        yield bad(f"session {name}", "session", session=name)
    yield bad("session of 10 kB", "session", session="sessions/" + "a" * 10_000)
    yield bad("session of 64", "session", session="sessions/" + "a" * 64)
    yield bad("session with a line's end", "session", session="sessions/known\n")
    yield bad("session and policy", "policy", session="sessions/known", policy="buzz")
    for policy in ("nonsense", "buzz(", "buzz(stride=2)", "buzz(threshold=0)", "buzz(sink=1e3)", "x" * 256):
        yield bad(f"policy {policy[:20]}", "policy", policy=policy)
    yield bad("policy of 10 kB", "policy", policy="buzz(" + "x" * 10_000)
    yield bad("unknown on_cancel", "on_cancel", on_cancel=99)
    yield bad("unknown when_busy", "when_busy", when_busy=-1)
    yield BadRequest("a request id without a session", STREAM, turn(request_id="once"), "request_id")
    yield BadRequest("a place in no answer", STREAM, turn(session="sessions/a", next_index=1), "next_index")
    gone = turn(session="sessions/unknown")
    yield BadRequest("unknown session", STREAM, gone, None, NOT_FOUND, "SESSION_NOT_FOUND")
    foreign = turn(session="sessions/known")
    tenant = (("x-apiary-tenant", "somebody-else"),)
    yield BadRequest("foreign session", GENERATE, foreign, None, NOT_FOUND, "SESSION_NOT_FOUND", tenant)


def _sessions() -> Iterator[BadRequest]:
    def bad(name: str, field: str, /, session_id: str = "", **fields: Any) -> BadRequest:
        request = s.CreateSessionRequest(session_id=session_id, session=s.Session(**fields))
        return BadRequest(f"create: {name}", CREATE, request, field)

    for id in ("-a", "A", "a/b", "a" * 64, "ä", "sessions/a", " ", "a\n", "a" * 10_000):
        yield bad(f"id {id[:20]!r} of {len(id)}", "session_id", session_id=id)
    stamp = Timestamp(seconds=int(time.time()) + 60)
    for name, value in {
        "name": "sessions/mine",
        "create_time": stamp,
        "update_time": stamp,
        "state": s.Session.STATE_RESIDENT,
        "turn_count": 3,
        "token_count": 3,
        "cache": s.CacheUsage(),
    }.items():
        yield bad(f"output-only {name}", f"session.{name}", **{name: value})
    for name, duration in {
        "zero": Duration(),
        "negative": Duration(seconds=-5),
        "longer than 10 years": Duration(seconds=YEARS, nanos=1_000_000),
        "out of range": Duration(seconds=2**62),
        "of two signs": Duration(seconds=1, nanos=-1),
    }.items():
        yield bad(f"ttl {name}", "session.ttl", ttl=duration)
    for name, moment in {
        "zero": Timestamp(),
        "past": Timestamp(seconds=1_600_000_000),
        "beyond 10 years": Timestamp(seconds=int(time.time()) + YEARS + 3600),
        "out of range": Timestamp(seconds=2**62),
        "with bad nanos": Timestamp(seconds=stamp.seconds, nanos=-1),
    }.items():
        yield bad(f"expire_time {name}", "session.expire_time", expire_time=moment)
    yield bad("65 labels", "session.labels", labels={str(i): "x" for i in range(65)})
    yield bad("empty label", "session.labels[]", labels={"": "x"})
    yield bad("label key of 64", f"session.labels[{'k' * 64}]", labels={"k" * 64: "x"})
    yield bad("label value of 257", "session.labels[k]", labels={"k": "x" * 257})
    yield bad("bad policy", "session.policy", policy="buzz(stride=2)")
    yield bad("policy of 257", "session.policy", policy="x" * 257)
    exists = s.CreateSessionRequest(session_id="known")
    yield BadRequest("create: again", CREATE, exists, None, grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")

    for method, kind in ((GET, s.GetSessionRequest), (DELETE, s.DeleteSessionRequest)):
        verb = method.rpartition("/")[2]
        for name in ("", "known", "sessions/", "sessions/*", "sessions/" + "a" * 64):
            yield BadRequest(f"{verb} {name[:20]!r}", method, kind(name=name), "name")
        unknown = kind(name="sessions/unknown")
        yield BadRequest(f"{verb} unknown", method, unknown, None, NOT_FOUND, "SESSION_NOT_FOUND")
        yield BadRequest(
            f"{verb} foreign",
            method,
            kind(name="sessions/known"),
            None,
            NOT_FOUND,
            "SESSION_NOT_FOUND",
            (("x-apiary-tenant", "somebody-else"),),
        )
    yield BadRequest("list: negative page", LIST, s.ListSessionsRequest(page_size=-1), "page_size")
    for token in ("?", "YQ", "YS9i", "ä", "YWJj\n", "A" * 10_000):
        request = s.ListSessionsRequest(page_token=token)
        yield BadRequest(f"list: token {token[:20]!r}", LIST, request, "page_token")
    fork = "/apiary.v1.SessionService/ForkSession"
    for name in ("", "work", "sessions/", "sessions/A"):
        yield BadRequest(f"fork of {name!r}", fork, s.ForkSessionRequest(name=name), "name")
    bad = s.ForkSessionRequest(name="sessions/a", session_id="A b")
    yield BadRequest("fork: a malformed id", fork, bad, "session_id")
    yield BadRequest(
        "fork of nothing",
        fork,
        s.ForkSessionRequest(name="sessions/unknown"),
        None,
        grpc.StatusCode.NOT_FOUND,
        "SESSION_NOT_FOUND",
    )
    update = "/apiary.v1.SessionService/UpdateSession"
    name = "sessions/a"
    for case, changed, paths, field in (
        ("no name", s.Session(policy="full"), [], "session.name"),
        ("nothing", s.Session(name=name), [], "session"),
        ("what is output only", s.Session(name=name, turn_count=3), [], "session.turn_count"),
        ("an unknown path", s.Session(name=name), ["colour"], "update_mask"),
        ("an output's path", s.Session(name=name), ["turn_count"], "update_mask"),
        ("a path that is not set", s.Session(name=name), ["ttl"], "session.ttl"),
        ("no time to live", s.Session(name=name, ttl=Duration(seconds=0)), ["ttl"], "session.ttl"),
        (
            "too many labels",
            s.Session(name=name, labels={str(i): "" for i in range(65)}),
            [],
            "session.labels",
        ),
    ):
        yield BadRequest(
            f"update: {case}",
            update,
            s.UpdateSessionRequest(session=changed, update_mask=FieldMask(paths=paths)),
            field,
        )
    yield BadRequest(
        "update of nothing",
        update,
        s.UpdateSessionRequest(session=s.Session(name="sessions/unknown", labels={"a": "b"})),
        None,
        grpc.StatusCode.NOT_FOUND,
        "SESSION_NOT_FOUND",
    )
    rewind = "/apiary.v1.SessionService/RewindSession"
    yield BadRequest("rewind of no name", rewind, s.RewindSessionRequest(turn_count=1), "name")
    yield BadRequest(
        "rewind of nothing",
        rewind,
        s.RewindSessionRequest(name="sessions/unknown"),
        None,
        grpc.StatusCode.NOT_FOUND,
        "SESSION_NOT_FOUND",
    )
    take_out, take_in = (f"/apiary.v1.SessionService/{verb}Session" for verb in ("Export", "Import"))
    yield BadRequest("export of no name", take_out, s.ExportSessionRequest(), "name")
    nothing = s.ExportSessionRequest(name="sessions/unknown")
    yield BadRequest("export of nothing", take_out, nothing, None, NOT_FOUND, "SESSION_NOT_FOUND")
    bad_id = s.ImportSessionRequest(session_id="A b", chunk=b"x")
    yield BadRequest("import: a malformed id", take_in, bad_id, "session_id")
    for chunk in (b"", b"x", b"x" * 100_000):
        noise = s.ImportSessionRequest(chunk=chunk)
        yield BadRequest(f"import of {len(chunk)} bytes", take_in, noise, None, INVALID, "SNAPSHOT_REFUSED")
    for name in ("", "known", "sessions/", "sessions/*"):
        yield BadRequest(f"map of {name!r}", MAP, s.GetCacheMapRequest(name=name), "name")
    for title, fields, field in (
        ("an unknown view", {"view": 9}, "view"),
        ("a layer twice", {"layers": [0, 1, 0]}, "layers"),
        ("no such layer", {"layers": [0, 2**32 - 1]}, "layers[1]"),
        ("millions of layers", {"layers": [0] * 2**21}, "layers"),
        ("too many columns", {"column_count": 513}, "column_count"),
        ("too many tokens", {"token_limit": 1001}, "token_limit"),
        ("a limit to all", {"view": s.GetCacheMapRequest.VIEW_FULL, "token_limit": 9}, "token_limit"),
    ):
        request = s.GetCacheMapRequest(name="sessions/known", **fields)  # type: ignore[arg-type]
        yield BadRequest(f"map: {title}", MAP, request, field)
    nothing, known = (s.GetCacheMapRequest(name=f"sessions/{id}") for id in ("unknown", "known"))
    yield BadRequest("map of nothing", MAP, nothing, None, NOT_FOUND, "SESSION_NOT_FOUND")
    stranger = (("x-apiary-tenant", "somebody-else"),)
    yield BadRequest("map, foreign", MAP, known, None, NOT_FOUND, "SESSION_NOT_FOUND", stranger)


def _others() -> Iterator[BadRequest]:
    yield BadRequest("tokenize nothing", TOKENIZE, g.TokenizeRequest(), "input")
    yield BadRequest("tokenize empty text", TOKENIZE, g.TokenizeRequest(text=""), "text")
    no_user = g.TokenizeRequest(messages=chat((ASSISTANT, "x")))
    yield BadRequest("tokenize no user", TOKENIZE, no_user, "messages.messages[0].role")
    yield BadRequest("detokenize nothing", DETOKENIZE, g.DetokenizeRequest(), "token_ids")
    for place, id in enumerate((2**30, 2**32 - 1)):
        request = g.DetokenizeRequest(token_ids=[1] * place + [id])
        yield BadRequest(f"detokenize {id}", DETOKENIZE, request, f"token_ids[{place}]")
    lots = g.DetokenizeRequest(token_ids=[1] * 131_073)
    yield BadRequest("detokenize 131,073", DETOKENIZE, lots, "token_ids")
    for name in ("fake", "models/", "models", "models/a b", "models/" + "a" * 10_000):
        yield BadRequest(f"model {name[:20]!r}", MODEL, m.GetModelRequest(name=name), "name")
    other = m.GetModelRequest(name="models/gpt-17")
    yield BadRequest("another model", MODEL, other, None, NOT_FOUND, "MODEL_NOT_FOUND")

    valid = turn(text="hello").SerializeToString()
    utf8 = turn(text="hello").SerializeToString().replace(b"hello", b"h\xff\xfelo")
    nested = b"\x0b" * 200  # groups without end
    malformed = {"truncated": valid[:-1], "not UTF-8": utf8, "noise": b"\xff" * 64, "too deep": nested}
    for name, payload in malformed.items():
        for method in (STREAM, GENERATE):
            yield BadRequest(f"{name} for {method}", method, payload, None, INVALID, "MALFORMED_MESSAGE")
    for method in (TOKENIZE, DETOKENIZE, CREATE, GET, LIST, DELETE, MODEL, CAPACITY):
        yield BadRequest(f"noise for {method}", method, b"\xff" * 64, None, INVALID, "MALFORMED_MESSAGE")
    for path in ("Nope", "generate", "", "Generate/x"):
        method, reason = f"/apiary.v1.GenerationService/{path}", "METHOD_NOT_IMPLEMENTED"
        yield BadRequest(f"method {path!r}", method, b"", None, UNIMPLEMENTED, reason)

    tenants: dict[str, tuple[tuple[str, str | bytes], ...]] = {
        "empty": (("x-apiary-tenant", ""),),
        "of two words": (("x-apiary-tenant", "a b"),),
        "of 64": (("x-apiary-tenant", "a" * 64),),
        "of 4 kB": (("x-apiary-tenant", "a" * 4096),),
        "given twice": (("x-apiary-tenant", "a"), ("x-apiary-tenant", "b")),
        "binary": (("x-apiary-tenant-bin", b"\xff\x00"),),
    }
    for name, metadata in tenants.items():
        for method in (STREAM, LIST, CAPACITY):
            payload = turn() if method == STREAM else b""
            title = f"tenant {name} for {method}"
            yield BadRequest(title, method, payload, "x-apiary-tenant", metadata=metadata)


BAD_REQUESTS = [*_turns(), *_sessions(), *_others()]
