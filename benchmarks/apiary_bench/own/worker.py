"""Workers that a measurement starts, one after the other, on a state directory of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from apiary_bench.errors import LoadError, SettingsError
from apiary_bench.peers.apiary import serving
from apiary_bench.peers.process import Process
from apiary_client import Capacity, Model, aio
from apiary_client.errors import ApiaryError

CALL = 30.0  # seconds that a call without a turn may take


@dataclass(frozen=True, slots=True)
class Workers:
    """They are all `apiary serve` with these flags.

    Attributes:
        flags: without those that say where it listens and what it stores.
        place: a directory that takes what it stores, and its log.
    """

    flags: Mapping[str, str]
    place: Path

    @property
    def state(self) -> Path:
        """The state directory of all of them."""
        return self.place / "state"

    @asynccontextmanager
    async def start(self, more: Mapping[str, str] | None = None) -> AsyncIterator[tuple[Process, aio.Client]]:
        """The next one, with more flags; it ends with the context.

        Yields:
            Its process and a connection to it, once it is ready.

        Raises:
            EngineError: it does not start.
        """
        flags = {**self.flags, "--state-dir": str(self.state), **(more or {})}
        async with (
            serving("apiary", flags, self.place / "worker.log") as (process, target),
            aio.Client(target) as client,
        ):
            yield process, client


@contextmanager
def temporary(name: str, flags: Mapping[str, str], directory: Path | None) -> Iterator[Workers]:
    """Workers of which nothing is left behind.

    Args:
        name: of the measurement.
        flags: as `Workers` takes them.
        directory: takes their directory; None: where temporary files are.

    Raises:
        LoadError: a call in the context failed.
    """
    with TemporaryDirectory(prefix=f"apiary-{name}-", dir=directory) as place:
        try:
            yield Workers(flags, Path(place))
        except ApiaryError as error:
            raise LoadError(told(error)) from error


async def meet(client: aio.Client, longest: int) -> tuple[Model, Capacity]:
    """What a worker serves, and its budgets.

    Raises:
        SettingsError: it never takes inputs of `longest` tokens.
    """
    model = await client.get_model(timeout=CALL)
    if longest > model.max_prompt_tokens:
        raise SettingsError(f"the worker takes turns of at most {model.max_prompt_tokens} tokens")
    return model, await client.get_capacity(timeout=CALL)


def told(error: ApiaryError) -> str:
    """What a call failed with, in a line."""
    return f"{error.reason or error.code.name}: {error.message}"
