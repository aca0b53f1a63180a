"""Progress on stderr."""

from __future__ import annotations

import pytest

from apiary_client.cli.bench.bars import Bars


def test_a_bar_for_every_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with Bars() as bars:
        bars("history", 0, 4)
        bars("history", 4, 4)
        bars("turns", 1, 6)
    out, err = capsys.readouterr()
    assert out == ""
    history, turns = err.splitlines()
    assert history.split()[0] == "history"
    assert "4/4" in history
    assert turns.split()[0] == "turns"
    assert "1/6" in turns


def test_without_a_stage_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars():
        pass
    assert capsys.readouterr() == ("", "")
