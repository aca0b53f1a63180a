"""Turns of the bare engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from apiary_bench.engine.bare import Answer
from apiary_bench.errors import LoadError
from apiary_server.errors import InvalidField
from apiary_server.sessions.info import State
from tests.benchmarks.engine.small import workbench


def test_a_turn_has_as_many_tokens_as_asked_for(model_path: Path) -> None:
    with workbench(model_path).engine(2) as bare:
        names = bare.create(2)
        ended: list[None] = []
        answers = asyncio.run(bare.turns(names, 12, 30, lambda: ended.append(None)))
        assert len(ended) == 2
        for answer in answers:
            assert answer.tokens == 30
            assert answer.sent < answer.first <= answer.last  # a busy machine may read all at once
            assert answer.tpot > 0
        assert [bare.engine.sessions.get("default", name).token_count for name in names] == [42, 42]
        assert bare.those(names, State.RESIDENT) == names
        assert bare.those(names, State.PARKED) == []
        bare.delete(names)
        assert bare.engine.capacity().resident_sessions == bare.engine.capacity().sessions == 0


def test_times_of_an_answer() -> None:
    answer = Answer(sent=10.0, first=12.0, last=12.0, tokens=4, decoding=6.0)
    assert (answer.ttft, answer.tpot) == (2.0, 2.0)


def test_an_answer_that_is_cut_short_is_an_error(model_path: Path) -> None:
    with (
        workbench(model_path, policy="full(bound=50)").engine(1) as bare,
        pytest.raises(LoadError, match=r"after 11 of 30 tokens, since full\(bound=50\) holds no more"),
    ):
        asyncio.run(bare.turn(bare.create(1)[0], 40, 30))


def test_a_turn_that_the_worker_refuses(model_path: Path) -> None:
    with workbench(model_path).engine(1) as bare, pytest.raises(InvalidField, match="131073 tokens"):
        asyncio.run(bare.turn(bare.create(1)[0], 131_073, 1))
