"""The comparison's own row: a real worker, started by the command."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Run


def test_apiary_is_started_measured_and_ended(apiary: Run, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    where = ("--model", str(tiny_model), "--directory", str(tmp_path / "peers"), "--json", str(out))
    what = ("--quick", "--repeats", "1", "--workload", "turns,prefill", "--peers", "apiary-fp32")
    done = apiary("bench", "peers", *where, *what)
    assert done.returncode == 0, done.stderr
    turns, prefill = json.loads(out.read_text())["runs"]
    for run in (turns, prefill):
        assert run["identity"]["weights"] == run["identity"]["cache"] == "float32"
        assert run["identity"]["budget_bytes"] == 2**30
        for point in run["points"]:
            assert point["void"] is None
            assert point["measures"]["rate"] > 0
            assert point["measures"]["memory_bytes"] > 2**20
    assert [turn["tokens"] for turn in turns["points"][0]["turns"]] == [16] * 6
    assert "apiary-fp32" in done.stdout
