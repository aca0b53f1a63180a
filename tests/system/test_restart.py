"""Sessions that outlive their worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apiary_client import State

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
        assert answer.usage.rebuild_reason is None, "its cache was stored; the others had none"
    assert worker.stop() == 0


def test_a_state_directory_has_one_worker(
    start: Callable[[], Worker], tiny_model: Path, tmp_path: Path
) -> None:
    worker = start()
    second = Worker(tmp_path, "--model", str(tiny_model), *SMALL, "--state-dir", str(tmp_path / "state"))
    assert second.process.wait(60) == 1
    assert "in use by another worker" in second.stderr
    assert worker.stop() == 0
