"""Evaluation files that are missing or malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apiary_bench.errors import DataError
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.data import rows
from apiary_bench.quality.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_file_is_named(name: str, bench: Callable[..., Bench], tmp_path: Path) -> None:
    task = TASKS[name]
    with pytest.raises(DataError, match=rf"{task.files[0]} is missing: --data names the directory"):
        task.documents(tmp_path, bench(), 1, 0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", ":2 is no JSON"),
        ("[]", ":2 is no JSON object"),
        ('{"summary": "b"}', ":2: 'document' must be a str, but is missing"),
        ('{"document": 5, "summary": "b"}', ":2: 'document' must be a str, but is a int"),
        ('{"document": "", "summary": "b"}', ":2: 'document' is empty"),
    ],
)
def test_a_bad_row_is_told_with_its_place(
    line: str, why: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    good = json.dumps({"document": "a river", "summary": "river"})
    (tmp_path / "xsum.jsonl").write_text(f"{good}\n{line}\n")
    assert len(TASKS["xsum"].documents(tmp_path, bench(), 1, 0)) == 1
    with pytest.raises(DataError, match=why):
        TASKS["xsum"].documents(tmp_path, bench(), 2, 0)


def test_a_bad_answer_or_document_is_told(bench: Callable[..., Bench], tmp_path: Path) -> None:
    row = {"question": "who", "answers": ["x", 3], "documents": [{"title": "a", "text": "b"}]}
    (tmp_path / "qa10.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="'answers' must be a str, but is a int"):
        TASKS["qa10"].documents(tmp_path, bench(), 1, 0)
    row = {"question": "who", "answers": ["x"], "documents": [{"title": "a"}]}
    (tmp_path / "qa10.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="'text' must be a str, but is missing"):
        TASKS["qa10"].documents(tmp_path, bench(), 1, 0)


def test_empty_and_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        list(rows(tmp_path, "a.jsonl", {}))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        list(rows(tmp_path, "b.jsonl", {}))


def test_texts_that_are_too_short_or_too_long(bench: Callable[..., Bench], tmp_path: Path) -> None:
    (tmp_path / "wikitext2.txt").write_text("a few words")
    with pytest.raises(DataError, match="has 11 tokens, less than one segment of 3072"):
        TASKS["wikitext"].documents(tmp_path, bench(), 1, 0)
    with pytest.raises(DataError, match="3 words, too few"):
        TASKS["recall"].documents(tmp_path, bench(), 1, 0)
    long = json.dumps({"document": "stone " * 700, "summary": "b"})
    (tmp_path / "xsum.jsonl").write_text(long)
    with pytest.raises(DataError, match=r"xsum.jsonl:1 takes \d+ tokens, and the model has 4096 positions"):
        TASKS["xsum"].documents(tmp_path, bench(), 1, 0)
