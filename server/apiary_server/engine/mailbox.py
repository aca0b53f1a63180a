"""What other threads ask of the engine thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

_Outcome = TypeVar("_Outcome")


class Mailbox:
    """Commands for the engine thread, which takes them between its steps. `post` and `call` are for any
    thread, the others for that one.

    Attributes:
        closed: that thread takes nothing any more.
    """

    def __init__(self) -> None:
        self.closed = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._posting = threading.Lock()
        self._alone = threading.RLock()

    def post(self, command: Callable[[], None]) -> None:
        """Have something done before the next step; when there is none any more, at once."""
        with self._posting:
            if not self.closed:
                self._commands.put(command)
                return
        with self._alone, torch.inference_mode():  # as there: such tensors refuse changes elsewhere
            command()

    def call(self, work: Callable[[], _Outcome]) -> Future[_Outcome]:
        """Have something done in the same way. Returns what comes of it; to cancel that has it not done, if
        it has not begun."""
        outcome: Future[_Outcome] = Future()
        self.post(lambda: settle(outcome, work))
        return outcome

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for."""
        return self._commands.empty()

    def obey(self, wait: float) -> None:
        """Do what was asked for; if that is nothing, wait so many seconds for the first."""
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=wait > 0, timeout=wait)()
            while True:
                self._commands.get_nowait()()

    def close(self) -> None:
        """Do what was asked for still. Whoever asks later does it himself."""
        with self._posting:
            self.closed = True
        with self._alone:
            self.obey(0)


def settle(outcome: Future[_Outcome], work: Callable[[], _Outcome]) -> None:
    """Do something whose outcome somebody waits for, unless it was cancelled."""
    if outcome.set_running_or_notify_cancel():
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)
