"""The first steps of a process: nobody's."""

from __future__ import annotations

from apiary_server.model.runner import Piece, Runner
from apiary_server.model.sampler import Choice, sample
from apiary_server.model.types import Sampling
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import Session
from apiary_server.sessions.transaction import Transaction
from buzz import Rotary

_SEGMENTS = (32, 1)  # tokens: of a short prompt, and one that is decoded


def warm_up(runner: Runner, residency: Residency, session: Session, rotary: Rotary) -> None:
    """Take a turn that is nobody's, and roll it back. Libraries set up much in the first pass of a thread:
    it takes twice as long, for which no caller should wait.

    Args:
        runner: the forward pass.
        residency: memory of sessions.
        session: one of no table, without tokens.
        rotary: the model's.
    """
    turn = Transaction(session, residency, rotary)
    turn.open()
    for tokens in _SEGMENTS:
        if turn.full:
            break
        count = min(tokens, session.layout.capacity - turn.cache.n)
        turn.begin_segment(count, prompt=tokens > 1)
        logits = runner.run([Piece([0] * count, turn.cache, turn.place, logits=True)])
        sample(logits, [Choice(Sampling(), seed=0, index=0)])
        turn.end_segment()
    turn.rollback()
