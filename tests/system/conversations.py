"""Sessions that are used while workers die, and what was acknowledged of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from apiary_client import Client, Completion, errors

from .reading import tokens

TOKENS = 12
LONGEST = 10  # turns


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a session: the prompt, which is the request's id, too, and the answer, if it was told."""

    prompt: str
    token_ids: Sequence[int] | None = None


State = tuple[Turn, ...] | None  # of a session: its turns; None: there is none


@dataclass
class Conversation:
    """Goes on in two sessions, in turns: asks, rewinds, forks, deletes.

    Attributes:
        possible: how each session may be now: one state, if what was done last was acknowledged, else the one
            before and the one after it.
        acknowledged: how much was done while it went on.
        fault: what failed and should not have.
    """

    name: str
    rng: random.Random
    possible: dict[str, Sequence[State]] = field(init=False)
    acknowledged: int = 0
    fault: Exception | None = None
    _serial: int = 0

    def __post_init__(self) -> None:
        self.possible = {f"{self.name}-{side}": [None] for side in "ab"}

    def go_on(self, client: Client, enough: threading.Event) -> None:
        """Until it is enough, the worker has gone, or says that its store is slow."""
        try:
            while not enough.is_set() and self._certain():
                self._act(client, {name: possible[0] for name, possible in self.possible.items()})
                self.acknowledged += self._certain()
        except errors.ApiaryError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                self.fault = error
        except Exception as error:
            self.fault = error

    def ask(self, client: Client, name: str, turns: tuple[Turn, ...], again: str | None = None) -> Completion:
        """Run a turn, or the one with this prompt again."""
        if again is None:
            self._serial += 1
        prompt = again or f"{self._serial} of {name}: go on."
        self.possible[name] = [turns, (*turns, Turn(prompt))]
        answer = client.generate(
            prompt, session=name, stopping=tokens(TOKENS), request_id=prompt, timeout=120
        )
        if answer.usage.durable:
            self._done(name, (*turns, Turn(prompt, answer.token_ids)))
        return answer

    def _certain(self) -> bool:
        return all(len(possible) == 1 for possible in self.possible.values())

    def _act(self, client: Client, states: Mapping[str, State]) -> None:
        there = [name for name, turns in states.items() if turns is not None]
        name = self.rng.choice(there or list(states))
        turns, chance = states[name], self.rng.random()
        other = next(each for each in states if each != name)
        if turns is None:
            self.possible[name] = [None, ()]
            client.create_session(name, timeout=120)
            self._done(name, ())
        elif len(turns) >= LONGEST or (turns and chance < 0.1):
            fewer = turns[: self.rng.randrange(len(turns))]
            self.possible[name] = [turns, fewer]
            client.rewind_session(name, len(fewer), timeout=120)
            self._done(name, fewer)
        elif turns and chance < 0.2 and states[other] is None:
            self.possible[other] = [None, turns]
            client.fork_session(name, other, timeout=120)
            self._done(other, turns)
        elif chance < 0.2 and states[other] is not None:
            self.possible[name] = [turns, None]
            client.delete_session(name, timeout=120)
            self._done(name, None)
        else:
            self.ask(client, name, turns)

    def _done(self, name: str, state: State) -> None:
        self.possible[name] = [state]
