"""Restarts of real workers, by the command in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run


@pytest.mark.timeout(300)
def test_a_session_comes_back_by_its_snapshot(apiary: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "resume.json"
    flags = "--threads 1 --history 200 --input 8 --turns 2 --others 2 --repeats 1 --kill"
    where = ("--model", str(tiny_model), "--directory", str(tmp_path), "--json", str(out))
    done = apiary("bench", "resume", *flags.split(), *where, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "after the ready line / warm" in done.stdout
    (repeat,) = json.loads(out.read_text())["repeats"]
    assert [repeat[name]["rebuild_reason"] for name in ("resumed", "recomputed")] == [None, "restarted"]
    assert (repeat["resumed"]["cached_tokens"], repeat["recomputed"]["cached_tokens"]) == (200, 0)
    # a prompt's last token was answered, and that answer is in no cache yet
    assert [first["cached_tokens"] for first in repeat["warm"]] == [218, 227]
    assert all(seconds > 0 for seconds in repeat["ready"])
    assert list(tmp_path.glob("apiary-resume-*")) == [], "nothing is left"
