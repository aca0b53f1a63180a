"""Forks in a real worker, by the command in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Run


def test_forks_beyond_the_budget_all_answer(apiary: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "fork.json"
    flags = "--threads 1 --history 200 --input 8 --output 4 --forks 30 --holds 6"
    where = ("--model", str(tiny_model), "--directory", str(tmp_path), "--json", str(out))
    done = apiary("bench", "fork", *flags.split(), *where, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "31 sessions, 4 tokens each" in done.stdout
    found = json.loads(out.read_text())
    slot = found["environment"]["capacity"]["slot_bytes"]
    assert [fork["displaced"] for fork in found["forks"]] == 5 * [0] + 25 * [1]
    assert {fork["copied_bytes"] for fork in found["forks"][:5]} == {slot}
    assert {fork["copied_bytes"] for fork in found["forks"][5:]} == {2 * slot}
    assert found["summary"]["made"] == {"resident": 6, "parked": 25}
    assert sum(found["summary"]["answered"].values()) == 31
    assert [first["cached_tokens"] for first in found["firsts"]] == 31 * [200]
    assert list(tmp_path.glob("apiary-fork-*")) == [], "nothing is left"
