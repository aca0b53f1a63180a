"""An engine without a model: bytes are tokens, answers are `t0 t1 t2 ...`, and tests say what goes wrong."""

from __future__ import annotations

import dataclasses
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from apiary_server import errors
from apiary_server.engine.cache_map import CacheCopy, CacheMap, draw
from apiary_server.engine.delivery import Delivery, TokenStream
from apiary_server.engine.places import Place, Places
from apiary_server.engine.request import CacheMapRequest, Messages, Text, TokenIds, TurnRequest
from apiary_server.engine.result import Capacity, Delta, FinishReason, ModelInfo, TokenLogprob, Usage
from apiary_server.sessions.info import RebuildReason, SessionInfo, State
from apiary_server.sessions.request import SessionChange

VOCABULARY = 49_152

MODEL = ModelInfo(
    name="fake",
    architecture="LlamaForCausalLM",
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=VOCABULARY,
    max_positions=8192,
    weight_dtype="float32",
    cache_dtype="float32",
    default_policy="buzz(sink=4,window=160,threshold=400,stride=5)",
    default_max_tokens=512,
    max_tokens=32_768,
    max_prompt_tokens=131_072,
    eos_token_ids=(2,),
    chat=True,
)
USAGE = Usage(
    prompt_tokens=3,
    cached_tokens=2,
    completion_tokens=4,
    evicted_entries=1,
    queue_time=0.25,
    prefill_time=0.5,
    decode_time=1.5,
    seed=7,
)
CAPACITY = Capacity(*range(1, 17), store_degraded=True, store_error="sessions: the disk is full")


class FakeEngine:
    """The interface of `apiary_server.engine.engine.Engine`, with threads that answer at a set pace.

    Set `full` to have `reserve` refuse, `refusal` to have `open` raise, `failure` to have answers end in it
    after their first token, `count` and `pace` (seconds) for the answers' tokens, and `admission` (seconds)
    for how long `open` takes.
    """

    def __init__(self) -> None:
        self.model = MODEL
        self.sessions = FakeSessions()
        self.keeper = FakeKeeper(self.sessions)
        self.porter = FakePorter(self.sessions)
        self.healthy = True
        self.on_unhealthy: Callable[[], None] | None = None
        self.full = False
        self.places = Places()
        self.refusal: Exception | None = None
        self.failure: errors.ApiaryError | None = None
        self.count, self.pace, self.admission = 4, 0.0, 0.0
        self.requests: list[TurnRequest] = []
        self.opening = threading.Event()  # `open` was called
        self.dropped = threading.Event()  # an answer found its stream closed
        self.calls: list[str] = []
        self.running = 0

    def start(self) -> None:
        self.calls.append("start")

    def drain(self) -> None:
        self.calls.append("drain")
        self.refusal = errors.Draining("the worker is shutting down", retry_after=1.5)

    def stop(self, grace: float) -> None:
        self.calls.append(f"stop({grace})")
        deadline = time.monotonic() + grace
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        self.failure = errors.Draining("the worker is shutting down", retry_after=1.5)
        while self.running:
            time.sleep(0.01)

    def reserve(self, tenant: str) -> Place:
        if self.full:
            raise errors.QueueFull("the queue is full", retry_after=2.5)
        return self.places.take(tenant, lambda _tenant, _taken: None)

    def open(self, request: TurnRequest, stream: TokenStream, place: Place) -> Future[None]:
        place.release()
        self.opening.set()
        time.sleep(self.admission)
        if self.refusal is not None:
            raise self.refusal
        self._check(request)
        if request.session is not None:
            self.sessions.begin(request.tenant, request.session)
        self.requests.append(request)
        self.running += 1
        threading.Thread(target=self._answer, args=(request, stream), daemon=True).start()
        queued: Future[None] = Future()
        queued.set_result(None)
        return queued

    def tokenize(self, input: Text | Messages) -> list[int]:
        texts = [input.text] if isinstance(input, Text) else [one.content for one in input.messages]
        return list("".join(texts).encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        self._in_vocabulary(ids, "token_ids")
        return " ".join(map(str, ids))

    def capacity(self) -> Capacity:
        return CAPACITY

    def moves(self) -> Mapping[str, int]:
        return {}

    def cache_map(self, copy: CacheCopy, request: CacheMapRequest, most_bytes: int) -> CacheMap:
        return draw(
            copy, request, lambda tokens, places: [f"t{tokens[place]}" for place in places], most_bytes
        )

    def _check(self, request: TurnRequest) -> None:
        most = self.model.max_tokens
        if (request.stopping.max_tokens or 0) > most:
            raise errors.InvalidField([("stopping.max_tokens", f"at most {most}")])
        self._in_vocabulary(request.stopping.stop_token_ids, "stopping.stop_token_ids")
        self._in_vocabulary(list(request.sampling.logit_bias), "sampling.logit_bias")
        if request.policy is not None:
            check_policy(request.policy)
        if isinstance(request.input, TokenIds):
            self._in_vocabulary(request.input.ids, "token_ids.ids")
        elif len(self.tokenize(request.input)) > self.model.max_prompt_tokens:
            field = "text" if isinstance(request.input, Text) else "messages"
            raise errors.InvalidField([(field, f"at most {self.model.max_prompt_tokens} tokens")])

    @staticmethod
    def _in_vocabulary(ids: Sequence[int], field: str) -> None:
        for place, id in enumerate(ids):
            if id >= VOCABULARY:
                raise errors.InvalidField([(f"{field}[{place}]", f"{id} is not in the vocabulary")])

    def _answer(self, request: TurnRequest, stream: TokenStream) -> None:
        delivery = Delivery()
        count = min(self.count, request.stopping.max_tokens or self.count)
        for place in range(count):
            time.sleep(self.pace)
            if stream.closed:
                self.dropped.set()
                break
            if self.failure is not None and place > 0:
                delivery.send(stream, self.failure)
                delivery.flush()
                break
            logprobs = [TokenLogprob(place, -0.5, ((place, -0.5), (9, -2.0)))] if request.logprobs else []
            delta = Delta(f"t{place} ", [place], place, logprobs)
            if place == count - 1:
                delta.finish_reason, delta.usage = FinishReason.LENGTH, USAGE
            delivery.send(stream, delta)
            delivery.flush()
        if request.session is not None:
            self.sessions.end(request.tenant, request.session)
        self.running -= 1


class FakeKeeper:
    """The interface of `apiary_server.engine.keeper.Keeper`."""

    def __init__(self, sessions: FakeSessions) -> None:
        self._sessions = sessions

    def look(self, tenant: str, id: str) -> Future[CacheCopy]:
        """Two layers of two heads, which keep four of nine tokens; none before there is a turn."""
        looked: Future[CacheCopy] = Future()
        info = self._sessions.get(tenant, id)
        if info.state is State.BUSY:
            raise errors.SessionBusy(f"sessions/{id} has a turn in flight")
        from buzz import parse

        kept = [[[0, 3, 7, 8], [0, 4, 7, 8]], [[0, 3, 7, 8], [0, 5, 7, 8]]]
        position = np.array(kept, np.int32)[..., : 4 if info.turn_count else 0]
        seen = 9 if info.turn_count else 0
        copy = CacheCopy(
            id=id,
            policy=parse("h2o(heavy=2,recent=2,block=1)"),
            state=info.state,
            sampled=0,
            seen=seen,
            position=position,
            score=position.astype(np.float32) / 4,
            tokens=array("I", range(100, 100 + seen)),
        )
        threading.Timer(0.01, looked.set_result, (copy,)).start()
        return looked

    def create(self, *fields: Any) -> Future[SessionInfo]:
        created: Future[SessionInfo] = Future()
        threading.Timer(0.01, created.set_result, (self._sessions.create(*fields),)).start()
        return created

    def update(self, tenant: str, id: str, change: SessionChange) -> Future[SessionInfo]:
        updated: Future[SessionInfo] = Future()
        info = self._sessions.get(tenant, id)
        changes: dict[str, Any] = {}
        if change.policy is not None:
            changes["policy"] = check_policy(change.policy)
        if change.labels is not None:
            changes["labels"] = change.labels
        if change.expire_time is not None or change.ttl is not None:
            changes["expire_time"] = change.expire_time or info.create_time + (change.ttl or 0.0)
        self._sessions.table[tenant, id] = dataclasses.replace(info, **changes)
        threading.Timer(0.01, updated.set_result, (self._sessions.table[tenant, id],)).start()
        return updated

    def rewind(self, tenant: str, id: str, turns: int) -> Future[SessionInfo]:
        rewound: Future[SessionInfo] = Future()
        info = self._sessions.get(tenant, id)
        if turns > info.turn_count:
            raise errors.InvalidField([("turn_count", f"is {turns}, and {info.turn_count} turns are there")])
        threading.Timer(0.01, rewound.set_result, (dataclasses.replace(info, turn_count=turns),)).start()
        return rewound

    def fork(self, tenant: str, id: str, new: str | None) -> Future[SessionInfo]:
        forked: Future[SessionInfo] = Future()
        source = self._sessions.get(tenant, id)
        if (tenant, new) in self._sessions.table:
            raise errors.SessionExists(f"sessions/{new}")
        info = dataclasses.replace(source, id=new or "drawn")
        self._sessions.table[tenant, info.id] = info
        threading.Timer(0.01, forked.set_result, (info,)).start()
        return forked

    def delete(self, tenant: str, id: str) -> Future[None]:
        self._sessions.remove(tenant, id)
        done: Future[None] = Future()
        threading.Timer(0.01, done.set_result, (None,)).start()
        return done


class FakePorter:
    """The interface of `apiary_server.engine.porter.Porter`. A session's bytes are ten digits, which say how
    many bytes follow, and these."""

    def __init__(self, sessions: FakeSessions) -> None:
        self._sessions = sessions
        self.size = 3_000_000
        self.taken_in: list[bytes] = []

    def take_out(self, tenant: str, id: str) -> Future[Sequence[bytes]]:
        self._sessions.get(tenant, id)
        done: Future[Sequence[bytes]] = Future()
        done.set_result([b"%010d" % self.size, b"", bytes(self.size)])
        return done

    def length(self, start: bytes) -> int | None:
        if not start[:10].isdigit() and start:
            raise errors.SnapshotRefused("it is no snapshot", RebuildReason.SNAPSHOT_CORRUPT)
        return int(start[:10]) + 10 if len(start) >= 10 else None

    def take_in(self, tenant: str, id: str | None, data: bytes) -> Future[SessionInfo]:
        self.taken_in.append(data)
        done: Future[SessionInfo] = Future()
        if len(data) != self.length(data):
            done.set_exception(errors.SnapshotRefused("it is cut off", RebuildReason.SNAPSHOT_CORRUPT))
        else:
            done.set_result(self._sessions.create(tenant, id, None, None, None, {}))
        return done


class FakeSessions:
    """The interface of `apiary_server.sessions.manager.SessionManager`."""

    def __init__(self) -> None:
        self.table: dict[tuple[str, str], SessionInfo] = {}
        self.created: list[dict[str, object]] = []

    def create(
        self,
        tenant: str,
        id: str | None,
        policy: str | None,
        expire_time: float | None,
        ttl: float | None,
        labels: Mapping[str, str],
    ) -> SessionInfo:
        self.created.append({"policy": policy, "expire_time": expire_time, "ttl": ttl})
        policy = check_policy(policy or "buzz")
        id = id or f"drawn-{len(self.table)}"
        if (tenant, id) in self.table:
            raise errors.SessionExists(f"sessions/{id}")
        now = 1_700_000_000.25
        info = SessionInfo(
            id=id,
            policy=policy,
            create_time=now,
            update_time=now,
            expire_time=expire_time or now + (ttl or 60.0),
            labels=dict(labels),
            state=State.EMPTY,
            turn_count=0,
            token_count=0,
            entries=0,
            bound=564,
            bytes=0,
        )
        self.table[tenant, id] = info
        return info

    def get(self, tenant: str, id: str) -> SessionInfo:
        if (tenant, id) not in self.table:
            raise errors.SessionNotFound(f"sessions/{id}")
        return self.table[tenant, id]

    def list(self, tenant: str, page_size: int, after: str) -> tuple[list[SessionInfo], str]:
        ids = sorted(id for owner, id in self.table if owner == tenant and id > after)
        page = ids[:page_size]
        return [self.table[tenant, id] for id in page], page[-1] if len(ids) > page_size else ""

    def remove(self, tenant: str, id: str) -> None:
        self.get(tenant, id)
        del self.table[tenant, id]

    def begin(self, tenant: str, id: str) -> None:
        if self.get(tenant, id).state is State.BUSY:
            raise errors.SessionBusy(f"sessions/{id} has a turn in flight")
        self.table[tenant, id] = dataclasses.replace(self.table[tenant, id], state=State.BUSY)

    def end(self, tenant: str, id: str) -> None:
        if (tenant, id) in self.table:
            self.table[tenant, id] = dataclasses.replace(self.table[tenant, id], state=State.EMPTY)


def check_policy(spec: str) -> str:
    """The policy's full spec, or the error that the worker has for a bad one."""
    from buzz import PolicyError, parse  # with torch, which takes seconds that most processes need not spend

    try:
        return str(parse(spec))
    except PolicyError as error:
        raise errors.InvalidField([("policy", str(error))]) from error
