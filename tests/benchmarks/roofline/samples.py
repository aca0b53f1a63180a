"""A result that nobody measured."""

from __future__ import annotations

from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.floor import Load
from apiary_bench.roofline.part import Part
from apiary_bench.roofline.run import Plan, Result, Row

PLAN = Plan(sessions=(1, 16))
PARTS = {part: 0.001 * number for number, part in enumerate(Part)}


def row(sessions: int) -> Row:
    return Row(
        sessions=sessions,
        load=Load(sessions, 550.4 * sessions, 0),
        floor={Part.LINEAR: 0.01, Part.ATTENTION: 0.006},
        parts=PARTS,
        mean=0.036,
        median=0.032,
        p99=0.05,
        steps=[0.032] * 64,
    )


RESULT = Result(
    ceilings=Ceilings(threads=2, copy=20e9, read=24e9, gemm=250e9, int8=None),
    period=32,
    rows=[row(1), row(16)],
)
