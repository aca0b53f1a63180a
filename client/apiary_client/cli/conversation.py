"""A conversation as the chat command holds it: a session, and what each of its turns is asked with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from apiary_client.client import Client
from apiary_client.types import Delta, Message, Sampling, Session, Stopping


class Conversation:
    """Asks turn after turn; `system` goes with the first turn that is committed."""

    def __init__(
        self, client: Client, session: Session, sampling: Sampling, stopping: Stopping, system: str | None
    ) -> None:
        self.client = client
        self.session = session
        self._sampling = sampling
        self._stopping = stopping
        self._system = system

    def ask(self, text: str) -> Generator[Delta]:
        """Say `text` and iterate over the answer; closing the iterator takes the turn back."""
        opening = [Message("system", self._system)] if self._system is not None else []
        deltas = self.client.stream(
            [*opening, Message("user", text)],
            session=self.session,
            sampling=self._sampling,
            stopping=self._stopping,
        )
        with closing(deltas):
            for delta in deltas:
                if delta.finish_reason is not None:
                    self._system = None
                yield delta
