"""Outcomes that outlive a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from apiary_bench.errors import BenchError
from apiary_bench.quality.journal import Journal
from apiary_bench.quality.tasks.task import Outcome

OUTCOME = Outcome("h2o(heavy=9,recent=9)", 18, 12.5, 1e6, 2_000_000, 1.01e6, {"kl": 0.125})


def test_what_was_put_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    with Journal(path) as journal:
        journal.put("key", 3, [OUTCOME, OUTCOME])
        assert journal.get("key", 3) == [OUTCOME, OUTCOME]
    with Journal(path) as journal:
        assert journal.get("key", 3) == [OUTCOME, OUTCOME]
        assert journal.get("key", 2) is None
        assert journal.get("other", 3) is None


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.partial"
    with Journal(path) as journal:
        journal.put("key", 0, [OUTCOME])
        journal.put("key", 1, [OUTCOME])
    path.write_bytes(path.read_bytes()[:-20])
    with Journal(path) as journal:
        assert journal.get("key", 0) == [OUTCOME]
        assert journal.get("key", 1) is None
        journal.put("key", 1, [OUTCOME])
    with Journal(path) as journal:
        assert journal.get("key", 1) == [OUTCOME]


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_text("Dear journal,\nhello\n")
    with pytest.raises(BenchError, match="letter:1 is no line of a journal"):
        Journal(path)
    assert path.read_text() == "Dear journal,\nhello\n"
    with pytest.raises(BenchError, match="cannot be kept"):
        Journal(tmp_path / "missing" / "a.partial")


def test_without_a_file_nothing_is_kept() -> None:
    with Journal(None) as journal:
        journal.put("key", 0, [OUTCOME])
        assert journal.get("key", 0) == [OUTCOME]
