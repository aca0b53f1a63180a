"""Drives a load over any engine: one event loop, one task a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from time import perf_counter

from apiary_bench.errors import LoadError
from apiary_bench.peers.engine import Engine, EngineError, Turn
from apiary_bench.peers.workload import Load, tokens
from apiary_bench.serving.record import Outcome, Record


async def drive(
    engine: Engine, load: Load, name: str, seed: int, vocab_size: int, ended: Callable[[], None]
) -> list[Record]:
    """Give the conversations their history, then take the measured turns; return their records in order of
    session and turn. `sent` is from the beginning of the first measured turn. The sessions are forgotten by
    the engine only with `Engine.forget`.

    Args:
        engine: that takes the turns.
        load: what to send.
        name: what the load's sessions are called, and their tokens drawn from, beside `seed`.
        seed: of the tokens.
        vocab_size: of the model.
        ended: is called at the end of each turn.

    Raises:
        LoadError: a turn before the measured ones was not completed.
    """
    places = asyncio.Semaphore(load.parallel)
    conversations = [_Conversation(engine, called, place) for place, called in enumerate(names(load, name))]

    def draw(conversation: _Conversation, turn: str, count: int) -> list[int]:
        return tokens(seed, f"{conversation.name} {turn}", count, vocab_size)

    async def prepare(conversation: _Conversation) -> None:
        async with places:
            record = await conversation.take(draw(conversation, "history", load.history), 1, -1, 0.0)
        if record.outcome is not Outcome.COMPLETED:
            raise LoadError(f"the history of session {conversation.place}: {failure(record)}")
        ended()

    async def measure(conversation: _Conversation) -> list[Record]:
        records = []
        async with places:
            for number in range(load.turns):
                fresh = draw(conversation, f"turn {number}", load.input)
                records.append(await conversation.take(fresh, load.output, number, began))
                ended()
                if records[-1].outcome is not Outcome.COMPLETED:
                    break  # its next turn would not be the one that others take
        return records

    try:
        if load.history:
            async with asyncio.TaskGroup() as group:
                for conversation in conversations:
                    group.create_task(prepare(conversation))
        began = perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(measure(conversation)) for conversation in conversations]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [record for task in tasks for record in task.result()]


def names(load: Load, name: str) -> list[str]:
    """What the sessions of such a load are called."""
    return [f"{name}-{place}" for place in range(load.sessions)]


def failure(record: Record) -> str:
    """Why a turn was not completed."""
    return record.message or f"it was cut short, {record.tokens} of {record.asked} tokens came"


class _Conversation:
    def __init__(self, engine: Engine, name: str, place: int) -> None:
        self.name = name
        self.place = place
        self._engine = engine
        self._tokens: list[int] = []

    async def take(self, fresh: list[int], output: int, number: int, began: float) -> Record:
        """Take one turn, and note when what came. What came stays in the conversation."""
        self._tokens += fresh
        turn = Turn(self.name, tuple(self._tokens), len(fresh), output)
        arrivals: list[float] = []
        counts: list[int] = []
        outcome = Outcome.FAILED
        message = None
        sent = perf_counter()
        try:
            async with aclosing(self._engine.take(turn)) as answer:
                async for ids in answer:
                    arrivals.append(perf_counter() - sent)
                    counts.append(len(ids))
                    self._tokens += ids
            outcome = Outcome.COMPLETED if sum(counts) == output else Outcome.CUT_SHORT
        except EngineError as error:
            message = error.message
        return Record(
            session=self.place,
            turn=number,
            sent=sent - began,
            ended=perf_counter() - sent,
            arrivals=tuple(arrivals),
            arrival_tokens=tuple(counts),
            input=len(fresh),
            asked=output,
            outcome=outcome,
            message=message,
        )
