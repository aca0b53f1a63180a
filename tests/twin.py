"""An engine that nothing happens to: it says what a session must answer, whatever happens to another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apiary_server.engine.engine import Engine
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.session import Session
from apiary_server.sessions.snapshot import history
from apiary_server.settings import Settings
from apiary_server.worker import build
from tests.server.driver import begin, create, outcome, request, run, session, step
from tests.system.reading import TIE


@dataclass(frozen=True, slots=True)
class Expected:
    """An answer of the twin.

    Attributes:
        token_ids: of the answer.
        margins: between the two likeliest tokens at each place.
        cached_tokens: of the turn, if nothing has to be computed anew.
    """

    token_ids: Sequence[int]
    margins: Sequence[float]
    cached_tokens: int

    def agrees(self, token_ids: Sequence[int]) -> bool:
        """Whether these are the same tokens; the two may part where the two likeliest are tied."""
        for mine, theirs, margin in zip(self.token_ids, token_ids, self.margins, strict=False):
            if mine != theirs:
                return margin < TIE
        return len(self.token_ids) == len(token_ids)


class Twin:
    """An engine with memory for all its sessions, and no store.

    Args:
        model: the directory of the model.
        settings: what decides about answers: the policy, the slack, the workspace.
    """

    def __init__(self, model: Path, **settings: object) -> None:
        defaults: dict[str, object] = {"threads": 1, "cache_budget": 2**21}
        self._engine: Engine = build(Settings.load(model=str(model), **(defaults | settings)))
        self._answers: dict[str, list[tuple[str, Expected]]] = {}

    @property
    def tokenizer(self) -> str:
        """Its digest."""
        return self._engine._door.tokenizer.digest

    def record(self, name: str) -> Session:
        """Its own record of a session."""
        return session(self._engine, name)

    def create(self, name: str, policy: str | None = None) -> None:
        """Add an empty session."""
        create(self._engine, name, policy)

    def ask(
        self,
        name: str,
        input: list[int] | list[tuple[str, str]],
        max_tokens: int,
        taken: int | None = None,
    ) -> Expected:
        """Run a turn, greedily; with `taken`, its reader leaves after so many tokens and keeps them."""
        turns = self.record(name).turns
        cached = turns[-1].seen if turns else 0
        keep = taken is not None
        asked = request(input, name, max_tokens=max_tokens, logprobs=2, keep=keep)
        reader = begin(self._engine, asked, reads=not keep)
        if taken is not None:
            while len(reader.token_ids) < taken and not reader.ended:
                step(self._engine)
            reader.read(taken)
            reader.close()
        run(self._engine, reader)
        margins = [one.top[0][1] - one.top[1][1] for one in reader.logprobs]
        return Expected(reader.token_ids[:taken], margins[:taken], cached)

    def fork(self, name: str, new: str) -> None:
        """Copy a session."""
        outcome(self._engine, self._engine.keeper.fork("default", name, new))

    def rewind(self, name: str, turns: int) -> None:
        """Take the last turns back: the first `turns` stay."""
        if turns < len(self.record(name).turns):
            outcome(self._engine, self._engine.keeper.rewind("default", name, turns))

    def change(self, name: str, policy: str) -> None:
        """Change the policy."""
        outcome(self._engine, self._engine.keeper.update("default", name, SessionChange(policy=policy)))

    def delete(self, name: str) -> None:
        """Take a session away."""
        outcome(self._engine, self._engine.keeper.delete("default", name))

    def answers(self, name: str, prompts: Sequence[str], max_tokens: int) -> Sequence[Expected]:
        """What a session of the default policy answers to these messages, each a turn."""
        if name not in self._answers:
            self.create(name)
            self._answers[name] = []
        turns = self._answers[name]
        common = 0
        while common < min(len(turns), len(prompts)) and turns[common][0] == prompts[common]:
            common += 1
        self.rewind(name, common)
        del turns[common:]
        for prompt in prompts[common:]:
            turns.append((prompt, self.ask(name, [("user", prompt)], max_tokens)))
        return [expected for _, expected in turns]

    def history(self, name: str) -> str:
        """Digest of a session's turns, as a snapshot has it."""
        record = self.record(name)
        return history(record, len(record.turns))
