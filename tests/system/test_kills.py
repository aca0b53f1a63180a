"""Workers that are killed at any moment, and at each point of a commit: what was acknowledged is there,
nothing half-written is ever read, and answers go on as if nothing had been.

There are thirty kills here; `make test-kills` has 200.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from apiary_client import Client, RebuildReason
from apiary_server.model.fingerprint import fingerprint
from apiary_server.sessions.shelf import _key, _name
from apiary_server.sessions.snapshot import Origin, decode
from tests.twin import Twin

from .conversations import TOKENS, Conversation, Turn
from .mortal import Mortal, Parent
from .mortal_workers import POINTS
from .worker import POLICY, SMALL

MEMORY = ("--cache-budget", "160000", "--parked-budget", "0")  # bytes: for fewer than there are sessions
STORE = ("--checkpoints", "1")
PATIENCE = ("--store-patience", "600", "--stall-limit", "600")  # of whoever is stopped for a while
DEATH = 200.0  # seconds, at most, until a worker dies

pytestmark = pytest.mark.timeout(400)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "moment" in metafunc.fixturenames:
        metafunc.parametrize("moment", range(metafunc.config.getoption("kills") - len(POINTS)))


class Place:
    """A state directory, and those who talk there.

    Attributes:
        kills: how many workers were killed there.
        sound: whether all was as it should be when somebody looked.
    """

    def __init__(self, parent: Parent, twin: Twin, model: Path, directory: Path) -> None:
        self.kills = 0
        self.sound = False  # until it is there
        self._parent, self._twin, self._directory = parent, twin, directory
        self._state = directory / "state"
        self._arguments = (
            "--model",
            str(model),
            *SMALL,
            *MEMORY,
            *STORE,
            *PATIENCE,
            "--state-dir",
            str(self._state),
        )
        self._origin = Origin(fingerprint(model, "fp32", "float32", "float32"), twin.tokenizer)
        self._conversations = [Conversation(f"s{number}", random.Random(number)) for number in range(3)]
        self._worker = self._start()
        self._worker.wait_until_ready()
        self.sound = True

    @property
    def acknowledged(self) -> int:
        """How much was done and acknowledged before the kills."""
        return sum(conversation.acknowledged for conversation in self._conversations)

    def kill_at(self, point: str, number: int) -> None:
        """Talk until the worker has passed a point so often, and killed itself there."""
        with self._talking():
            self._worker.dies_at(point, number)

    def kill_after(self, seconds: float) -> None:
        """Talk for so long, and kill the worker."""
        with self._talking():
            time.sleep(seconds)
            self._worker.kill()

    def kill_while_it_starts(self, seconds: float) -> None:
        """Start another one, and kill it."""
        worker = self._start()
        time.sleep(seconds)
        worker.kill()
        self.kills += 1

    def check(self) -> None:
        """Start another worker: all that was acknowledged must be there, and go on as if nothing had been."""
        left = self._snapshots()
        self._worker = self._start()
        self._worker.wait_until_ready()
        assert not list(self._state.glob("snapshots/*.unfinished"))
        with self._worker.client() as client:
            found = {session.id: session.turn_count for session in client.list_sessions(timeout=DEATH)}
            for conversation in self._conversations:
                for name, possible in conversation.possible.items():
                    count = found.pop(name, None)
                    states = [state for state in possible if count == (None if state is None else len(state))]
                    assert states, f"{name} has {count} turns, and should be one of {possible}"
                    conversation.possible[name] = states[-1:]
                    if states[-1] is not None:
                        self._check(client, conversation, name, states[-1], left.get(name, {}))
            assert not found
        self.sound = True

    def end(self) -> None:
        """End the worker."""
        self._worker.kill()
        self.sound = False

    def _check(
        self,
        client: Client,
        conversation: Conversation,
        name: str,
        turns: tuple[Turn, ...],
        histories: Mapping[int, str],
    ) -> None:
        """Check a session that has those turns, and had snapshots of those histories when the worker died."""
        prompts = [turn.prompt for turn in turns]
        self._twin.answers(name, prompts, TOKENS)
        current = histories.get(len(turns)) == self._twin.history(name)
        if turns and turns[-1].token_ids is None:  # it was committed, and nobody was told
            told = conversation.ask(client, name, turns[:-1], again=prompts[-1])
            assert told.usage.durable
            turns = (*turns[:-1], Turn(prompts[-1], told.token_ids))
        answer = conversation.ask(client, name, turns)
        ((*_, last),) = conversation.possible[name]  # it is durable
        turns = (*turns, last)
        answers = self._twin.answers(name, [*prompts, last.prompt], TOKENS)
        for turn, expected in zip(turns, answers, strict=True):
            assert expected.agrees(turn.token_ids), turn.prompt
            if expected.token_ids != turn.token_ids:  # a tie: from here on the two are not the same
                client.delete_session(name)
                conversation.possible[name] = [None]
                return
        if current or not prompts:
            assert answer.usage.rebuild_reason is None
            assert answer.usage.cached_tokens == expected.cached_tokens
        else:
            assert answer.usage.rebuild_reason is RebuildReason.RESTARTED
            assert answer.usage.cached_tokens < expected.cached_tokens

    def _start(self) -> Mortal:
        return Mortal(self._parent, self._directory, *self._arguments)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Talk until the worker has died."""
        self.sound = False
        enough = threading.Event()
        with self._worker.client() as client:
            threads = [
                threading.Thread(target=conversation.go_on, args=(client, enough), daemon=True)
                for conversation in self._conversations
            ]
            for thread in threads:
                thread.start()
            try:
                yield
                for thread in threads:
                    thread.join(DEATH)
            finally:
                enough.set()
        assert [conversation.fault for conversation in self._conversations] == [None] * len(threads)
        assert self._worker.killed(DEATH)
        self.kills += 1

    def _snapshots(self) -> Mapping[str, Mapping[int, str]]:
        """What a dead worker left: of each session, by turns, what its snapshots are of; all are whole."""
        manifests = {}
        for file in (self._state / "snapshots").glob("*.snapshot"):
            manifests[file.name], _ = decode(file.read_bytes(), self._origin)
        copy = self._directory / "copy"  # which is changed by being opened
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._state, copy)
        with contextlib.closing(sqlite3.connect(copy / "sessions.db")) as database:
            rows = list(database.execute("SELECT tenant, id, create_time FROM sessions"))
        found = {}
        for tenant, id, create_time in rows:
            key = _key(SimpleNamespace(tenant=tenant, id=id, create_time=create_time))  # type: ignore[arg-type]
            found[id] = {
                manifest.turns: manifest.history
                for name, manifest in manifests.items()
                if name == _name(key, manifest.turns)
            }
        return found


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    parent = Parent()
    yield parent
    parent.end()


@pytest.fixture(scope="module")
def twin(tiny_model: Path) -> Twin:
    return Twin(tiny_model, policy=POLICY, slack=16, workspace_entries=256)


@pytest.fixture(scope="module")
def places(parent: Parent) -> Iterator[list[Place]]:
    places: list[Place] = []
    yield places
    for place in places:
        place.end()
    done = sum(place.acknowledged for place in places)
    assert done > sum(place.kills for place in places), "too little was done to lose anything"


@pytest.fixture
def place(
    places: list[Place],
    parent: Parent,
    twin: Twin,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    """The same place for all kills, unless something was lost there."""
    if places and not places[-1].sound:
        places[-1].end()
    if not places or not places[-1].sound:
        places.append(Place(parent, twin, tiny_model, tmp_path_factory.mktemp("place")))
    return places[-1]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Another one for each test: before each, the common one is as before the others."""
    return random.Random(f"{random.random()} {request.node.name}")


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_point_of_a_commit(place: Place, point: str, rng: random.Random) -> None:
    place.kill_at(point, rng.randint(1, 8))
    place.check()


def test_killed_at_a_random_moment(place: Place, moment: int, rng: random.Random) -> None:
    place.kill_after(rng.uniform(0.0, 1.5))
    if moment % 5 == 0:
        place.kill_while_it_starts(rng.uniform(0.0, 1.5))
    place.check()
