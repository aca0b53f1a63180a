"""Programs that are started, watched and ended."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from apiary_bench.peers import process
from apiary_bench.peers.engine import EngineError
from apiary_bench.peers.process import started

# starts another that would outlive it, tells its id, then holds 64 MiB
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
held = bytearray(b"x" * 2**26)
print(child.pid, flush=True)
sys.stdin.read()
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="it needs /proc")


async def test_memory_is_that_of_all_it_started_and_all_end_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT]
    async with started("p", command, tmp_path / "log", {}) as running:
        child = int(await running.read())
        assert alive(child)
        memory = running.memory()
        assert memory is not None
        assert 64 * 2**20 < memory < 512 * 2**20
    for _ in range(100):
        if not alive(child):
            break
        await asyncio.sleep(0.05)
    assert not alive(child)


async def test_what_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE", 0.2)
    async with started("p", [sys.executable, "-c", STUBBORN], tmp_path / "log", {}) as running:
        assert await running.read() == b"ready\n"
        pid = running._process.pid
        assert alive(pid)
    assert not alive(pid)


async def test_it_can_be_killed(tmp_path: Path) -> None:
    async with started("p", [sys.executable, "-c", STUBBORN], tmp_path / "log", {}) as running:
        assert await running.read() == b"ready\n"
        running.kill()
        assert await running.read() == b""
        running.kill()  # any often
    assert not alive(running._process.pid)


async def test_lines_go_both_ways_and_variables_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APIARY_CACHE_BUDGET", "1MiB")
    echo = "import os; print(input(), os.environ['MARK'], 'APIARY_CACHE_BUDGET' in os.environ)"
    async with started("p", [sys.executable, "-c", echo], tmp_path / "log", {"MARK": "x"}) as running:
        await running.write(b"hello")
        assert await running.read() == b"hello x False\n"
        assert await running.read() == b""


async def test_writing_to_what_has_ended_is_an_error(tmp_path: Path) -> None:
    async with started("p", [sys.executable, "-c", ""], tmp_path / "log", {}) as running:
        assert await running.read() == b""
        with pytest.raises(EngineError, match="p ended without a word"):
            await running.write(b"x" * 2**22)  # more than a pipe takes


async def test_the_end_of_the_block_ends_it_even_when_it_fails(tmp_path: Path) -> None:
    pids = []

    async def fail() -> None:
        async with started("p", [sys.executable, "-c", PARENT], tmp_path / "log", {}) as running:
            pids.append(running._process.pid)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await fail()
    assert [alive(pid) for pid in pids] == [False]
