"""A Valkey server that answers, or says why it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import valkey
from valkey import exceptions

from apiary_server.sessions.store import StoreError
from apiary_server.sessions.valkey.address import ValkeyAddress

TIMEOUT = 5.0  # seconds without a byte of an answer
LARGE_TIMEOUT = 60.0  # where a snapshot has to get to its disk
_ADVICE: Sequence[tuple[type[Exception], str]] = (  # the first that fits
    (exceptions.AuthenticationError, "check the user in --store and the password in --store-password-file"),
    (exceptions.NoPermissionError, "allow this user to read, write, run scripts, WAITAOF and INFO"),
    (exceptions.OutOfMemoryError, "raise its maxmemory, or lower --stored-budget"),
    (exceptions.ReadOnlyError, "name the primary in --store"),
    (exceptions.BusyLoadingError, "wait until it has read its data"),
    (exceptions.TimeoutError, "it is overloaded, its disk is slow, or the network drops what is sent"),
    (exceptions.ConnectionError, "see whether it runs, and whether --store names it"),
)


class Refused(StoreError):
    """The server answered with an error.

    Attributes:
        code: its first word.
        rest: the others.
    """

    def __init__(self, message: str, code: str, rest: str) -> None:
        super().__init__(message)
        self.code = code
        self.rest = rest


class Server:
    """Connections to a server, which are made when they are needed. Thread-safe.

    Args:
        address: where it is.
    """

    def __init__(self, address: ValkeyAddress) -> None:
        self._shown = address.shown
        # nothing is sent a second time by itself: whoever asks knows better what to do about a failure
        self._quick = valkey.Valkey(**address.options, socket_timeout=TIMEOUT)
        self._large = valkey.Valkey(
            **address.options, socket_timeout=LARGE_TIMEOUT, socket_connect_timeout=TIMEOUT
        )

    def ask(self, *commands: Sequence[object], large: bool = False) -> list[Any]:
        """What is answered to commands that are sent together, over one connection, one after the other.

        Args:
            commands: what to send.
            large: wait longer.

        Raises:
            Refused: one of them was; those after it were tried nevertheless.
            StoreError: the server cannot be reached, or does not answer in time.
        """
        try:
            with (self._large if large else self._quick).pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                # else the client's error would repeat the command, and so what somebody said
                answers: list[Any] = pipeline.execute(raise_on_error=False)
        except exceptions.ValkeyError as error:
            raise self._explained(error) from error
        for answer in answers:
            if isinstance(answer, exceptions.ValkeyError):
                raise self._explained(answer) from answer
        return answers

    def error(self, why: str) -> StoreError:
        """That something is wrong here."""
        return StoreError(f"{self._shown}: {why}")

    def close(self) -> None:
        """Close the connections."""
        self._quick.close()
        self._large.close()

    def _explained(self, error: exceptions.ValkeyError) -> StoreError:
        text = str(error).partition(" script: ")[0].rstrip(".")
        code, _, rest = text.partition(" ")
        if code == "MOVED":
            return self.error("this is a node of a cluster, and a single server is needed")
        advice = next((f"; {advice}" for kind, advice in _ADVICE if isinstance(error, kind)), "")
        message = f"{self._shown}: {text}{advice}"
        return (
            Refused(message, code, rest)
            if isinstance(error, exceptions.ResponseError)
            else StoreError(message)
        )
