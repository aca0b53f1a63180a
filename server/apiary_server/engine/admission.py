"""How a request becomes a turn: a place in the queue, its session's next turn and cache, and what came of it
before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from apiary_server import errors
from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.door import Door
from apiary_server.engine.loop import Loop
from apiary_server.engine.mailbox import Mailbox
from apiary_server.engine.places import Place, Places
from apiary_server.engine.request import TurnRequest
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.turn import Turn
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.session import Answer, Session


@dataclass(frozen=True, slots=True)
class _Opening:
    """A request on its way to the queue; `queued` is what its caller waits for."""

    request: TurnRequest
    stream: TokenStream
    place: Place
    queued: Future[None] = field(default_factory=Future)

    @contextlib.contextmanager
    def or_give_back(self) -> Iterator[None]:
        """Release the place if what is done fails."""
        try:
            yield
        except BaseException:
            self.place.release()
            raise

    @contextlib.contextmanager
    def or_tell(self) -> Iterator[None]:
        """If what is done fails, release the place and raise the error where the caller waits, not here."""
        try:
            with self.or_give_back():
                yield
        except BaseException as error:
            self.queued.set_exception(error)

    def done(self) -> None:
        """The place is no longer needed, and the caller need not wait."""
        self.place.release()
        self.queued.set_result(None)


class Admission:
    """Opens turns. Thread-safe.

    Args:
        door: turns requests into turns, or refuses them.
        scheduler: which turns may wait.
        mailbox: brings them to the engine thread.
        loop: what takes them there.
        sessions: the table of sessions.
    """

    def __init__(
        self,
        door: Door,
        scheduler: Scheduler,
        mailbox: Mailbox,
        loop: Loop,
        sessions: SessionManager,
    ) -> None:
        self._door = door
        self._scheduler = scheduler
        self._mailbox = mailbox
        self._loop = loop
        self._sessions = sessions
        self._places = Places()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, "admission")  # for turns that had to wait

    def __len__(self) -> int:
        """How many requests are on their way."""
        return len(self._places)

    def drain(self) -> None:
        """Open no more turns."""
        self._draining = True
        self._sessions.dismiss(errors.Draining())

    def close(self) -> None:
        """End the thread, after what waits for it: each of those turns is told why it will not run."""
        self._thread.shutdown(wait=False)

    def reserve(self, tenant: str) -> Place:
        """Take a place in the queue for a turn of a tenant. Waits for nothing, whatever the engine does.

        Raises:
            Draining: the worker is shutting down.
            QueueFull: too many turns wait.
        """
        if self._draining:
            raise errors.Draining()
        return self._places.take(tenant, self._scheduler.check_queue)

    def open(self, request: TurnRequest, stream: TokenStream, place: Place | None = None) -> Future[None]:
        """Check a request and queue its turn; the answer comes by `stream`. Blocks while it tokenises, not
        while another turn of the session is in flight.

        Args:
            request: what is asked.
            stream: where the answer goes.
            place: reserved for it, and released here; None takes one now.

        Returns:
            Done when the turn is queued, which is now unless another one of its session is in flight. What
            would be raised after that is raised there, and Cancelled if the reader leaves meanwhile.

        Raises:
            Draining, QueueFull: see `reserve`.
            InvalidField, SessionNotFound, SessionBusy, ContextFull, DeadlineExceeded: see `Door`.
        """
        opening = _Opening(request, stream, place or self.reserve(request.tenant))
        with opening.or_give_back():
            self._open(opening)
        return opening.queued

    def _open(self, opening: _Opening) -> None:
        earlier = self._door.earlier(opening.request)
        if isinstance(earlier, Turn):
            self._mailbox.post(lambda: self._attach(opening, earlier))
        elif earlier is not None:
            self._replay(opening, earlier)
        else:
            held = self._door.knock(opening.request, opening.stream)
            if held.done():
                self._queue(opening, held)
            else:
                held.add_done_callback(lambda _: self._go_on(opening, lambda: self._queue(opening, held)))
                opening.stream.on_close(held.cancel)

    def _queue(self, opening: _Opening, held: Future[Session]) -> None:
        """Queue a turn that has its session, unless the same request was before it in line."""
        if held.cancelled():
            raise errors.Cancelled("cancelled by the caller")
        session = held.result()
        try:
            earlier = self._door.earlier(opening.request)
        except BaseException:
            self._sessions.end_turn(session)
            raise
        if isinstance(earlier, Answer):
            self._sessions.end_turn(session)
            self._replay(opening, earlier)
            return
        turn = self._door.admit(opening.request, opening.stream, session)
        self._mailbox.post(lambda: self._arrive(opening, turn))
        opening.queued.set_result(None)

    def _replay(self, opening: _Opening, answer: Answer) -> None:
        whole = self._door.replay(opening.request, answer)
        self._loop.deliver_stored(answer.session, opening.stream, whole)
        opening.done()

    def _go_on(self, opening: _Opening, work: Callable[[], None]) -> None:
        """Do what is left in the thread, whoever's thread this is."""

        def go_on() -> None:
            with opening.or_tell():
                work()

        try:
            self._thread.submit(go_on)
        except RuntimeError:  # closed
            go_on()

    # the engine thread

    def _attach(self, opening: _Opening, turn: Turn) -> None:
        request = opening.request
        with opening.or_tell():
            if self._loop.attach(
                turn, request, opening.stream, lambda tokens: self._door.again(request, tokens)
            ):
                opening.done()
            else:  # it has ended meanwhile
                self._go_on(opening, lambda: self._open(opening))

    def _arrive(self, opening: _Opening, turn: Turn) -> None:
        self._loop.add(turn)
        opening.place.release()  # after: for an instant it counts twice, never not at all
