"""A disk that is full: serving goes on, what is not stored is told, and all of it is when there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from apiary_client import Capacity, Client
from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import StoreError

from .reading import tokens
from .worker import APIARY, SMALL, Worker, environment, until

Start = Callable[..., Worker]
ANSWER = tokens(12)


@contextmanager
def small_disk(directory: Path, size: str = "1m") -> Iterator[Path]:
    """A file system of its own, so small that it is soon full."""
    directory.mkdir(parents=True)
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("this machine has no mount command")
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    done = subprocess.run([mount, *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run([umount, "--lazy", str(directory)], check=True)


class Ballast:
    """A file that takes all room of a disk."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "ballast"

    def fill(self) -> None:
        with open(self._path, "ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert os.statvfs(self._path).f_bfree == 0

    def drop(self) -> None:
        self._path.unlink()


@pytest.fixture
def disks() -> Iterator[ExitStack]:
    """What ends with the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def state(disks: ExitStack, tmp_path: Path) -> Path:
    """A state directory on a disk of a megabyte."""
    return disks.enter_context(small_disk(tmp_path / "disk")) / "state"


@pytest.fixture
def start(start_worker: Start, tiny_model: Path, state: Path) -> Callable[[], Worker]:
    """Start a worker on it."""
    arguments = ["--model", str(tiny_model), *SMALL, "--state-dir", str(state)]
    return lambda: start_worker(*arguments, "--metrics-port", "0", "--log-format", "json")


def talk(client: Client, name: str, number: int) -> tuple[tuple[int, ...], bool]:
    """A turn: its answer, and whether it is durable. It has to come soon."""
    began = time.monotonic()
    answer = client.generate(f"Turn {number}.", session=name, stopping=ANSWER, timeout=60)
    assert time.monotonic() - began < 5
    return answer.token_ids, answer.usage.durable


def degraded(worker: Worker, client: Client, *what: str) -> Capacity | None:
    """What the worker says of itself, if it says everywhere that it cannot store these."""
    capacity = client.get_capacity()
    told = capacity.store_degraded and all(f"{each}: " in capacity.store_error for each in what)
    return capacity if told and _metric(worker) == 1 else None


def well(worker: Worker, client: Client) -> bool:
    """Whether it says everywhere that all is well."""
    capacity = client.get_capacity()
    return not capacity.store_degraded and not capacity.store_error and _metric(worker) == 0


def _metric(worker: Worker) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.metrics_port}/metrics", timeout=20) as response:
        lines = response.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith("apiary_store_degraded")))


def snapshots(state: Path) -> set[str]:
    """After how many turns there are snapshots, and what else lies there."""
    return {path.name.partition("-")[2] for path in (state / "snapshots").iterdir()}


def refused(worker: Worker) -> list[str]:
    """What the worker found that was not whole."""
    return [line for line in worker.stderr.splitlines() if "refused" in line or "cannot be read" in line]


def test_a_full_disk_stops_nobody(start: Callable[[], Worker], state: Path) -> None:
    ballast = Ballast(state.parent)
    first = start()
    with first.client() as client:
        for name in ("talk", "twin"):
            client.create_session(name)
            assert talk(client, name, 0)[1]
        assert until(lambda: snapshots(state) == {"1.snapshot"}, 20)
        ballast.fill()
        told = [talk(client, name, number) for number in range(1, 6) for name in ("talk", "twin")]
        assert not told[-1][1], "it cannot be on the disk"
        assert [answer for answer, _ in told[0::2]] == [answer for answer, _ in told[1::2]]
        capacity = until(lambda: degraded(first, client, "sessions", "caches"), 20)
        assert capacity
        assert capacity.store_error == (
            f"sessions: {state / 'sessions.db'}: database or disk is full; "
            f"caches: {state / 'snapshots'}: No space left on device"
        )
        ballast.drop()
        assert until(lambda: well(first, client), 20), "though nobody asks for anything"
        assert talk(client, "talk", 6)[1]
        assert talk(client, "twin", 6)[1]
        assert until(lambda: snapshots(state) == {"7.snapshot"}, 20)
    first.kill()

    second = start()
    with second.client() as client:
        assert [session.turn_count for session in client.list_sessions()] == [7, 7]
        answer, other = (
            client.generate("Turn 7.", session=name, stopping=ANSWER) for name in ("talk", "twin")
        )
        assert answer.token_ids == other.token_ids
        assert [each.usage.rebuild_reason for each in (answer, other)] == [None, None]
        assert not refused(second)
        assert until(lambda: snapshots(state) == {"8.snapshot"}, 20)
        ballast.fill()
        told = [talk(client, "talk", number) for number in range(8, 13)]
    second.kill()

    ballast.fill()
    third = start()
    assert "sessions are not stored" in third.stderr, "it is known before anybody relies on it"
    with third.client() as client:
        turns = client.get_session("talk").turn_count
        assert 8 + sum(durable for _, durable in told) <= turns < 13
        assert talk(client, "talk", turns)[0] == told[turns - 8][0]
        client.create_session("new")
        ballast.drop()
        assert until(lambda: well(third, client), 20)
        assert talk(client, "new", 0)[1]
        assert not refused(third)
    assert third.stop() == 0


def test_a_new_state_directory_needs_room(state: Path) -> None:
    """Nothing is served yet, and whoever names one wants sessions to last: the worker does not start."""
    Ballast(state.parent).fill()
    with pytest.raises(StoreError, match=f"{state}.*(full|No space)"):
        SqliteStore(state, "tokenizer")


def test_without_snapshots_turns_are_durable(
    disks: ExitStack, start_worker: Start, tiny_model: Path, tmp_path: Path
) -> None:
    """A full disk of the snapshots alone; then the whole directory is gone for a while."""
    state = tmp_path / "state"
    disk = disks.enter_context(small_disk(tmp_path / "disk", "64k"))
    state.mkdir()
    (state / "snapshots").symlink_to(disk)
    ballast = Ballast(disk)
    arguments = ["--model", str(tiny_model), *SMALL, "--state-dir", str(state), "--metrics-port", "0"]
    first = start_worker(*arguments, "--log-format", "json")
    with first.client() as client:
        for name in ("talk", "twin"):
            client.create_session(name)
        assert talk(client, "talk", 0) == talk(client, "twin", 0)
        assert until(lambda: snapshots(state) == {"1.snapshot"}, 20)
        ballast.fill()
        for number in (1, 2, 3):
            assert talk(client, "talk", number)[1]
            assert talk(client, "twin", number)[1]
        capacity = until(lambda: degraded(first, client, "caches"), 20)
        assert capacity
        assert capacity.store_error == f"caches: {state / 'snapshots'}: No space left on device"
        status = subprocess.run(
            [APIARY, "status", "--target", first.target], env=environment(), capture_output=True, text=True
        )
        assert f"degraded: {capacity.store_error}" in status.stdout
        expected = talk(client, "twin", 4)[0]
    first.kill()
    second = start_worker(*arguments, "--log-format", "json")
    with second.client() as client:
        answer = client.generate("Turn 4.", session="talk", stopping=ANSWER)
        assert (answer.token_ids, answer.usage.durable) == (expected, True)
        assert answer.usage.rebuild_reason == "restarted"
        assert until(lambda: degraded(second, client, "caches"), 20)
        ballast.drop()
        assert until(lambda: well(second, client), 20)
        assert "5.snapshot" in snapshots(state)
        assert not refused(second)
        away = state.rename(tmp_path / "away")
        assert not talk(client, "talk", 5)[1]
        gone = until(lambda: degraded(second, client, "sessions", "caches"), 20)
        assert gone
        assert gone.store_error.count("No such file or directory") == 2
        away.rename(state)
        assert until(lambda: well(second, client), 20)
        assert talk(client, "talk", 6)[1]
    assert second.stop() == 0
