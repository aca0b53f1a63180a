"""The synchronous client against a fake worker."""

from __future__ import annotations

import inspect
import time
from datetime import UTC, timedelta

import pytest

from apiary.v1 import session_pb2
from apiary_client import Client, EntryKind, FinishReason, KindCount, Message, State, aio
from apiary_client.errors import (
    DeadlineExceeded,
    SessionExists,
    SessionNotFound,
    SnapshotRefused,
    Unavailable,
)

from .fake_worker import CREATED, FakeWorker


def test_generate_returns_the_whole_answer(client: Client) -> None:
    answer = client.generate("hello there", logprobs=1)
    assert answer.text == "turn 1: hello there"
    assert answer.token_ids == (0, 1, 2, 3)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.logprobs[0].top[0].logprob == -0.5
    assert (answer.usage.completion_tokens, answer.usage.seed) == (4, 2**63)
    assert (answer.usage.queue_time, answer.usage.decode_time) == (0.25, 0.5)
    assert answer.usage.rebuild_reason == "model_changed"


def test_turns_of_a_session_stream(client: Client) -> None:
    session = client.create_session("work", policy="full", labels={"a": "b"})
    assert (session.name, session.policy, session.state) == ("sessions/work", "full", State.EMPTY)
    assert session.create_time == CREATED
    assert session.expire_time is not None
    assert session.expire_time.tzinfo is UTC
    for turn in (1, 2):
        *deltas, last = client.stream([Message("user", "go on")], session=session)
        assert "".join(delta.text for delta in deltas) == f"turn {turn}: go on"
        assert [delta.index for delta in deltas] == [0, 1, 2, 3]
        assert all(delta.finish_reason is None and delta.usage is None for delta in deltas)
        assert last.finish_reason is FinishReason.STOP
        assert last.usage is not None
    assert client.get_session(session).turn_count == 2
    client.delete_session("work")
    with pytest.raises(SessionNotFound):
        client.get_session("work")


def test_sessions_are_changed_and_forked(client: Client, worker: FakeWorker) -> None:
    client.create_session("work", policy="full", labels={"a": "b"})
    changed = client.update_session("work", policy="buzz", ttl=90, labels={"c": "d"})
    assert (changed.policy, dict(changed.labels)) == ("buzz", {"c": "d"})
    assert list(worker.requests[-1].update_mask.paths) == ["policy", "ttl", "labels"]
    assert dict(client.update_session("work", labels={}).labels) == {}
    with pytest.raises(ValueError, match="nothing to change"):
        client.update_session("work")
    assert client.rewind_session("work", 3).turn_count == 3
    forked = client.fork_session("work", "again")
    assert (forked.name, forked.policy) == ("sessions/again", "buzz")
    assert client.fork_session(forked).name == "sessions/drawn"
    with pytest.raises(SessionNotFound):
        client.fork_session("nobody")


def test_sessions_go_to_other_workers(client: Client, worker: FakeWorker) -> None:
    client.create_session("work")
    chunks = list(client.export_session("work"))
    assert [chunk.total_bytes for chunk in chunks] == [13, 0, 0]
    taken = client.import_session((chunk.data for chunk in chunks), "there")
    assert (taken.name, worker.metadata[-1]["x-apiary-session"]) == ("sessions/there", "sessions/there")
    assert client.import_session([b"one two", b" three"]).name == "sessions/drawn"
    with pytest.raises(SnapshotRefused):
        client.import_session([b"four"])
    with pytest.raises(SessionNotFound):
        list(client.export_session("nobody"))


def test_the_map_of_a_cache(client: Client, worker: FakeWorker) -> None:
    client.create_session("work", policy="buzz2")
    empty = client.get_cache_map("work")
    assert (empty.name, empty.state, empty.entries, empty.tokens) == ("sessions/work", State.EMPTY, 0, ())
    worker.sessions["sessions/work"].turn_count = 1
    summary = client.get_cache_map("work", column_count=5, token_limit=7)
    asked = worker.requests[-1]
    assert (asked.column_count, asked.token_limit, list(asked.layers)) == (5, 7, [])
    assert (summary.state, summary.entries, summary.kv_heads) == (State.RESIDENT, 4, 2)
    assert (summary.token_count, summary.kept_token_count) == (10, 8)
    assert [column.start for column in summary.columns] == [0, 2, 4, 6, 8]
    assert [column.stop for column in summary.columns] == [2, 4, 6, 8, 10]
    assert [column.kind for column in summary.columns] == ["sink", "cell", "cell", "cell", "window"]
    counts = (4, 0, 1, 1, 2), (2, 2, 1, 1, 2), (2, 2, 1, 1, 2)
    assert tuple(layer.column_entries for layer in summary.layers) == counts
    assert all(layer.heads == () for layer in summary.layers)
    assert summary.layers[2].kinds[1] == KindCount(EntryKind.CELL, 4)
    token = summary.tokens[1]
    assert (token.position, token.token_id, token.text, token.head_count) == (1, 101, "\u202e\x9b", 2)
    assert (token.mean_score, token.kinds) == (0.5, (EntryKind.CELL,))
    full = client.get_cache_map(client.get_session("work"), full=True, layers=[2, 0], column_count=1)
    assert worker.requests[-1].view == session_pb2.GetCacheMapRequest.VIEW_FULL
    assert [layer.layer for layer in full.layers] == [2, 0]
    head = full.layers[0].heads[1]
    assert (head.positions, head.scores) == ((0, 3, 6, 9), (0, 1.5, 3, 4.5))
    assert head.kinds == (EntryKind.SINK, EntryKind.CELL, EntryKind.CELL, EntryKind.WINDOW)


def test_text_and_token_ids_are_inputs_too(client: Client, worker: FakeWorker) -> None:
    assert client.generate(text="once").text == "turn 1: once"
    assert client.generate(token_ids=[1, 2]).text == "turn 1: [1, 2]"
    assert [request.WhichOneof("input") for request in worker.requests] == ["text", "token_ids"]


def test_leaving_the_loop_cancels_the_call(client: Client, worker: FakeWorker) -> None:
    for delta in client.stream("slow please"):
        assert delta.text == "turn"
        break
    assert worker.cancelled.wait(5)


def test_closing_the_iterator_cancels_the_call(client: Client, worker: FakeWorker) -> None:
    deltas = client.stream("slow please")
    assert next(deltas).text == "turn"
    assert not worker.cancelled.is_set()
    deltas.close()
    assert worker.cancelled.wait(5)


def test_an_iterator_that_never_ran_made_no_call(client: Client, worker: FakeWorker) -> None:
    client.stream("hello").close()
    assert worker.requests == []


def test_a_bad_stream_is_refused_before_it_starts(client: Client) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        client.stream()


def test_closing_the_client_ends_its_streams(worker: FakeWorker) -> None:
    with Client(worker.target) as client:
        deltas = client.stream("slow please")
        next(deltas)
    assert worker.cancelled.wait(5)
    deltas.close()


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_deadline_ends_a_turn(client: Client, method: str) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        list(getattr(client, method)("slow please", timeout=0.3))
    assert time.monotonic() - started < 3


def test_tokens_and_back(client: Client) -> None:
    ids = client.tokenize(text="büzz")
    assert ids == tuple("büzz".encode())
    assert client.detokenize(ids) == "büzz"
    assert client.tokenize("hi") == tuple(b"hi")


def test_the_list_turns_its_pages_as_needed(client: Client, worker: FakeWorker) -> None:
    for number in range(5):
        client.create_session(f"s{number}", ttl=timedelta(hours=1))
    sessions = client.list_sessions()
    assert next(sessions).id == "s0"
    assert worker.calls["ListSessionsRequest"] == 1
    assert [session.id for session in sessions] == ["s1", "s2", "s3", "s4"]
    assert worker.calls["ListSessionsRequest"] == 3
    assert len(list(client.list_sessions(page_size=5))) == 5
    assert worker.calls["ListSessionsRequest"] == 4


def test_a_name_is_taken_once(client: Client) -> None:
    client.create_session("work")
    with pytest.raises(SessionExists) as caught:
        client.create_session("work")
    assert caught.value.resource == "sessions/x"


def test_the_model_and_its_capacity(client: Client) -> None:
    model = client.get_model()
    assert (model.name, model.layers, model.eos_token_ids, model.chat) == ("models/fake", 30, (0, 2), True)
    capacity = client.get_capacity()
    assert (capacity.budget_bytes, capacity.used_bytes, capacity.queue_limit) == (2**30, 2**20, 256)


def test_a_worker_that_is_gone_is_unavailable(client: Client, worker: FakeWorker) -> None:
    client.get_model()
    worker.stop()
    with pytest.raises(Unavailable) as caught:
        client.generate("hello", timeout=10)
    assert caught.value.reason is None


def test_both_clients_offer_the_same() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"
        }

    assert surface(Client) == surface(aio.Client)
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(aio.Client).parameters)
