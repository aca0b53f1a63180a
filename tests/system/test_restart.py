"""Sessions that outlive their worker."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from apiary_client import Client, State, errors

from .reading import tokens
from .worker import SMALL, Worker

Start = Callable[..., Worker]
ANSWER = tokens(12)


@pytest.fixture
def start(start_worker: Start, tiny_model: Path, tmp_path: Path) -> Callable[[], Worker]:
    """Start a worker on the same state directory."""
    return lambda: start_worker("--model", str(tiny_model), *SMALL, "--state-dir", str(tmp_path / "state"))


def test_sessions_are_there_again(start: Callable[[], Worker]) -> None:
    worker = start()
    with worker.client() as client:
        client.create_session("talk", policy="buzz(window=16,threshold=24)", labels={"of": "bees"})
        client.create_session("empty", ttl=90)
        client.create_session("gone")
        calm = client.create_session("calm", policy="buzz(window=16,threshold=24)")
        for number in range(5):
            for session in ("talk", calm):
                answer = client.generate(
                    f"Turn {number}.", session=session, stopping=ANSWER, request_id=f"{number}"
                )
                assert answer.usage.durable
        client.delete_session("gone")
        client.rewind_session("talk", 4)
        client.fork_session("talk", "twin")
        before = {session.name: session for session in client.list_sessions()}
    assert worker.stop() == 0
    worker = start()
    with worker.client() as client:
        after = {session.name: session for session in client.list_sessions()}
        assert after.keys() == before.keys()
        for name, session in after.items():
            for field in ("policy", "labels", "turn_count", "token_count", "create_time", "expire_time"):
                assert getattr(session, field) == getattr(before[name], field), (name, field)
        assert after["sessions/talk"].state is State.STORED
        assert after["sessions/empty"].state is State.EMPTY
        again = client.generate("Turn 3.", session="talk", stopping=ANSWER, request_id="3")
        assert (len(again.token_ids), client.get_session("talk").turn_count) == (12, 4)
        answers = [client.generate("Turn 4.", session=name, stopping=ANSWER) for name in ("talk", "twin")]
        assert answers[0].token_ids == answers[1].token_ids
        assert [answer.usage.rebuild_reason for answer in answers] == ["restarted", "restarted"]
        answer = client.generate("Turn 5.", session="calm", stopping=ANSWER)
        assert answer.usage.rebuild_reason == "restarted"
    assert worker.stop() == 0


def test_a_state_directory_has_one_worker(
    start: Callable[[], Worker], tiny_model: Path, tmp_path: Path
) -> None:
    worker = start()
    second = Worker(tmp_path, "--model", str(tiny_model), *SMALL, "--state-dir", str(tmp_path / "state"))
    assert second.process.wait(60) == 1
    assert "in use by another worker" in second.stderr
    assert worker.stop() == 0


@pytest.mark.timeout(300)
def test_killed_at_any_moment_no_acknowledged_turn_is_lost(start: Callable[[], Worker]) -> None:
    """Turns and kills at random; what was acknowledged is there, and answers go on as without any kill."""
    rng = random.Random(7)
    acknowledged = {f"s{number}": 0 for number in range(4)}
    answers: dict[tuple[str, int], tuple[int, ...]] = {}

    def talk(client: Client, name: str) -> None:
        try:
            while True:
                number = acknowledged[name]
                answer = client.generate(
                    f"Turn {number} of {name}.",
                    session=name,
                    stopping=ANSWER,
                    request_id=f"{number}",
                    timeout=30,
                )
                assert answer.usage.durable
                answers[name, number] = answer.token_ids
                acknowledged[name] = number + 1
        except errors.ApiaryError:
            pass  # the worker was killed

    worker = start()
    with worker.client() as client:
        for name in acknowledged:
            client.create_session(name)
            client.generate(f"Turn 0 of {name}.", session=name, stopping=ANSWER, request_id="0")
            acknowledged[name] = 1
    for _ in range(6):
        with worker.client() as client:
            threads = [threading.Thread(target=talk, args=(client, name)) for name in acknowledged]
            for thread in threads:
                thread.start()
            threading.Event().wait(rng.uniform(0.05, 1.5))
            worker.kill()
            for thread in threads:
                thread.join(30)
        worker = start()
        with worker.client() as client:
            for name, count in acknowledged.items():
                turns = client.get_session(name).turn_count
                assert count <= turns <= count + 1, "at most one more, whose end did not arrive"
                if turns > count:  # it is told again
                    again = client.generate(
                        f"Turn {count} of {name}.", session=name, stopping=ANSWER, request_id=f"{count}"
                    )
                    answers[name, count] = again.token_ids
                    acknowledged[name] = turns
    with worker.client() as client:
        for name, count in acknowledged.items():
            calm = client.create_session()
            for number in range(count):
                whole = client.generate(f"Turn {number} of {name}.", session=calm, stopping=ANSWER)
                if (name, number) in answers:
                    assert answers[name, number] == whole.token_ids, (name, number)
    assert sum(acknowledged.values()) > 12
    assert worker.stop() == 0
