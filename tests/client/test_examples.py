"""The examples work, and clean up behind themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .fake_worker import FakeWorker

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ANSWERS = ("turn 1: My favourite colour is teal.", "turn 2: What is my favourite colour?")


@pytest.mark.parametrize("name", ["chat_sync.py", "chat_asyncio.py"])
def test_python(worker: FakeWorker, name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name), worker.target]
    said = subprocess.check_output(command, text=True, timeout=30)
    assert all(answer in said for answer in ANSWERS)
    assert worker.sessions == {}
    assert worker.calls["GenerateRequest"] in {2, 4}


@pytest.mark.parametrize("name", ["chat_sync.py", "chat_asyncio.py"])
def test_python_without_a_worker(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name), "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("UNAVAILABLE: ")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_node(worker: FakeWorker, tmp_path: Path) -> None:
    copy = shutil.copytree(
        EXAMPLES / "node", tmp_path / "node", ignore=shutil.ignore_patterns("node_modules")
    )
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline"]
    installed = subprocess.run(install, cwd=copy, capture_output=True, text=True, timeout=60)
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr[-200:]}")
    said = subprocess.check_output(
        ["node", "chat.mjs", worker.target],
        cwd=copy,
        env=os.environ | {"PROTO_PATH": str(ROOT / "proto")},
        text=True,
        timeout=30,
    )
    assert all(answer in said for answer in ANSWERS)
    assert "[FINISH_REASON_STOP, 7 tokens]" in said
    assert [metadata.get("x-apiary-session") for metadata in worker.metadata] == [None] + [
        "sessions/drawn-0"
    ] * 3
    assert worker.sessions == {}
