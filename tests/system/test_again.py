"""Lost connections, kept answers and lines, over real sockets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from apiary_client import Client, FinishReason, OnCancel, WhenBusy, errors

from .reading import tokens
from .worker import Worker, until

LONG = tokens(400)


def test_a_dropped_connection_loses_nothing(worker: Worker, client: Client) -> None:
    whole = client.generate("Tell me more.", stopping=LONG, timeout=60)
    client.create_session("talk")
    taken: list[int] = []
    text = ""
    for index in range(5):
        with worker.client() as other:
            stream = other.stream(
                "Tell me more.",
                session="talk",
                stopping=LONG,
                request_id="once",
                next_index=len(taken),
                timeout=60,
            )
            for delta in stream:
                assert delta.index == len(taken)
                taken += delta.token_ids
                text += delta.text
                if len(taken) > 20 * (index + 1) and index < 4:
                    break
    assert (tuple(taken), text) == (whole.token_ids, whole.text)
    session = client.get_session("talk")
    assert (session.turn_count, session.token_count) == (1, whole.usage.prompt_tokens + 400)
    again = client.generate("Tell me more.", session="talk", stopping=LONG, request_id="once", timeout=60)
    assert (again.token_ids, again.text, again.finish_reason) == (
        whole.token_ids,
        whole.text,
        FinishReason.LENGTH,
    )
    assert client.get_session("talk").turn_count == 1
    rest = client.generate(
        "Tell me more.", session="talk", stopping=LONG, request_id="once", next_index=390, timeout=60
    )
    assert (again.index, rest.index, rest.token_ids) == (0, 390, whole.token_ids[390:])


def test_what_was_delivered_is_kept(client: Client) -> None:
    client.create_session("talk")
    stream = client.stream(
        "Tell me more.", session="talk", stopping=tokens(30_000), on_cancel=OnCancel.KEEP, timeout=60
    )
    seen = 0
    for delta in stream:
        seen += len(delta.token_ids)
        if seen >= 30:
            break
    stream.close()
    assert until(lambda: client.get_session("talk").turn_count == 1, 10)
    prompt = client.tokenize("Tell me more.")
    kept = client.get_session("talk").token_count - len(prompt)
    assert kept >= seen  # HTTP/2 had more on its way
    assert (
        client.generate("Go on.", session="talk", stopping=tokens(5), timeout=60).usage.completion_tokens == 5
    )


def test_turns_wait_for_each_other(worker: Worker, client: Client) -> None:
    client.create_session("talk")

    def turn(number: int) -> int:
        with worker.client() as other:
            answer = other.generate(
                f"Turn {number}.",
                session="talk",
                stopping=tokens(40),
                when_busy=WhenBusy.WAIT,
                timeout=60,
            )
            return answer.usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(turn, range(8))) == [40] * 8
    assert client.get_session("talk").turn_count == 8


def test_a_deadline_ends_the_wait(worker: Worker, client: Client) -> None:
    client.create_session("talk")
    stream = client.stream("Tell me more.", session="talk", stopping=tokens(30_000), timeout=60)
    next(stream)
    with pytest.raises(errors.DeadlineExceeded):
        client.generate("And?", session="talk", when_busy=WhenBusy.WAIT, timeout=0.3)
    with pytest.raises(errors.SessionBusy):
        client.generate("And?", session="talk", timeout=10)
    assert until(lambda: client.get_capacity().queued_turns == 0, 5)
    stream.close()
    assert (
        client.generate("And?", session="talk", stopping=tokens(3), timeout=10).usage.completion_tokens == 3
    )


def test_forks_branch(client: Client) -> None:
    client.create_session("talk", labels={"of": "bees"})
    client.generate("Tell me more.", session="talk", stopping=tokens(60), timeout=60)
    for name in ("one", "two"):
        assert dict(client.fork_session("talk", name).labels) == {"of": "bees"}
    answers = [
        client.generate("Go on.", session=name, stopping=tokens(40), timeout=60).token_ids
        for name in ("one", "talk", "two")
    ]
    assert answers[0] == answers[1] == answers[2]
    client.generate("And on.", session="one", stopping=tokens(9), timeout=60)
    assert [client.get_session(name).turn_count for name in ("talk", "one", "two")] == [2, 3, 2]


def test_another_policy_is_told(client: Client) -> None:
    client.create_session("talk")
    client.generate("Tell me more.", session="talk", stopping=tokens(60), timeout=60)
    assert client.update_session("talk", policy="h2o(heavy=24,recent=24)").policy.startswith("h2o(")
    answers = [client.generate("Go on.", session="talk", stopping=tokens(9), timeout=60) for _ in range(2)]
    assert [answer.usage.rebuild_reason for answer in answers] == ["policy_changed", None]
    assert [answer.usage.cached_tokens > 0 for answer in answers] == [False, True]
