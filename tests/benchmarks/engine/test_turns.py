"""Late turns against early ones, of the tiny model."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

import pytest

from apiary_bench.engine.bare import Answer, Bare
from apiary_bench.engine.turns import Turns, run
from apiary_bench.errors import SettingsError
from tests.benchmarks.engine.small import Heard, workbench


def test_averages_are_of_whole_periods(model_path: Path) -> None:
    heard = Heard()
    plan = Turns(sessions=2, input=2, output=10, early=2, late=6, average=2, repeats=2)
    result = run(workbench(model_path), plan, heard)  # evicts 8 at a time: every 2 turns of 12 tokens
    assert (result.history, result.period, result.averaged) == (80, 2, 2)
    assert heard.stages == {"turns": [(done, 20) for done in range(21)]}
    assert [(len(sample.early), len(sample.late)) for sample in result.samples] == [(2, 2), (2, 2)]
    early, late = ([fmean(getattr(sample, name)) for sample in result.samples] for name in ("early", "late"))
    assert (result.early, result.late) == (median(early), median(late))
    assert result.ratio == median([late[0] / early[0], late[1] / early[1]])


def test_turns_are_counted_from_one(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, int]] = []
    turn = Bare.turn

    async def count(bare: Bare, session: str, input: int, output: int) -> Answer:
        answer = await turn(bare, session, input, output)
        info = bare.engine.sessions.get("default", session)
        turns.append((info.turn_count - 1, input))  # without the history
        return answer

    monkeypatch.setattr(Bare, "turn", count)
    run(workbench(model_path), Turns(input=2, output=6, early=2, late=4, average=1, repeats=1), Heard())
    history = [(0, 80)]
    assert turns[1:] == [*history, (1, 2), (2, 2), (3, 2), *history, (1, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (Turns(history=39), r"a history of 39 tokens is less than .* holds, 40"),
        (Turns(early=3, late=6), "is 1 turns of 32 tokens, and from turn 3 on there are fewer than 4 before"),
    ],
)
def test_turns_that_cannot_be_compared(model_path: Path, plan: Turns, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        run(workbench(model_path), plan, Heard())


def test_a_policy_without_periods(model_path: Path) -> None:
    with pytest.raises(SettingsError, match="never repeats"):
        run(workbench(model_path, policy="full(bound=3000)"), Turns(), Heard())
