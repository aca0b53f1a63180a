"""A long prompt beside streams on a real worker, by the command in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from apiary_client import Client

from .conftest import Run


def test_streams_go_on_beside_a_long_prompt(apiary: Run, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "interference.json"
    flags = "--streams 3 --history 60 --prompt 700 --quiet 8 --repeats 2"
    done = apiary("bench", "interference", *flags.split(), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "median" in done.stdout
    content = json.loads(out.read_text())
    for time in content["times"]:
        assert time["quiet"]["count"] >= 3 * 7
        assert time["loaded"]["count"] >= 3
        assert time["wait"] == time["beside"] / time["alone"]
        assert time["slowdown"] == time["loaded"]["p99"] / time["quiet"]["p99"]
    assert list(client.list_sessions()) == []
    capacity = client.get_capacity()
    assert (capacity.running_turns, capacity.queued_turns) == (0, 0)
