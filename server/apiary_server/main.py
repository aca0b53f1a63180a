"""The worker process: from settings to the ready line, to a drained end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import structlog

from apiary_server import logs, telemetry
from apiary_server.engine.result import Observer
from apiary_server.errors import ApiaryError
from apiary_server.rpc.app import App, check_address
from apiary_server.settings import Settings

if TYPE_CHECKING:
    from apiary_server.engine.engine import Engine

EXIT_UNHEALTHY = 70  # EX_SOFTWARE: a supervisor should start another
_UNHEALTHY_NOTICE = 1.0  # seconds in which health checks can see NOT_SERVING before the process ends
_ONE_SIGNAL = 1.0  # seconds in which another signal is the first one's: `timeout`, for one, sends two
_LAST_WORDS = 2.0  # seconds for the ends of the last streams to reach their readers

log = structlog.get_logger(__name__)


def serve(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT.

    Prints one line on stdout when ready. A signal drains: health says NOT_SERVING, new turns are refused,
    running ones finish within `drain_grace`, or are cut short; another signal, a second later or more, ends
    the process at once. If the engine breaks, the process ends with `EXIT_UNHEALTHY`.

    Raises:
        SystemExit: it could not start, as a line on stderr says: 2 for settings that cannot be served, 1 for
            what the machine lacks, such as the address.
    """
    logs.configure(settings)
    with _start_up():
        check_address(settings.listen)  # now, since loading takes its time
        observer = telemetry.build(settings)
    try:
        with _start_up():
            _say(f"loading {settings.model}", sys.stderr)
            engine = _build(settings, observer)
        observer.watch(engine.capacity, engine.moves)
        if observer.metrics_port is not None:
            log.info("metrics can be scraped", port=observer.metrics_port)
        asyncio.run(_serve(engine, settings))
    finally:
        observer.shutdown()


def _build(settings: Settings, observer: Observer) -> Engine:
    from apiary_server.worker import build  # here, since torch takes seconds: the first line is out by now

    return build(settings, observer)


async def _serve(engine: Engine, settings: Settings) -> None:
    with _start_up():
        app = App(engine, settings)
    stop = _on_signals()
    loop = asyncio.get_running_loop()
    engine.on_unhealthy = lambda: _leave_unhealthy(loop, app)
    engine.start()
    await app.start()
    # the libraries' objects stay: without this, a full garbage collection walks them, 0.2 s without a token
    gc.freeze()
    about = f"model {engine.model.name}, policy {engine.model.default_policy}"
    _say(f"ready on {app.address} ({about}, budget {_size(settings.cache_budget)})", sys.stdout)
    await stop.wait()

    log.info("draining", grace=settings.drain_grace)
    engine.drain()
    await app.refuse_health()
    await asyncio.to_thread(engine.stop, settings.drain_grace)
    await app.stop(_LAST_WORDS)
    log.info("drained")


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _on_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; another one ends the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    first = 0.0

    def on_signal(number: int) -> None:
        nonlocal first
        if not stop.is_set():
            stop.set()
            first = loop.time()
        elif loop.time() - first > _ONE_SIGNAL:
            log.warning("second signal: leaving at once", signal=number)
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def _leave_unhealthy(loop: asyncio.AbstractEventLoop, app: App) -> None:
    """Say NOT_SERVING, then end the process whatever hangs in it. Called from any thread."""
    log.critical("the engine is unhealthy: leaving", exit_code=EXIT_UNHEALTHY)
    threading.Timer(_UNHEALTHY_NOTICE, os._exit, (EXIT_UNHEALTHY,)).start()
    asyncio.run_coroutine_threadsafe(app.refuse_health(), loop)


@contextmanager
def _start_up() -> Iterator[None]:
    """Turn what can go wrong before the ready line into one line and an exit code."""
    try:
        yield
    except (ApiaryError, ValueError, OSError) as error:
        _say(" ".join(str(error).split()), sys.stderr)
        raise SystemExit(1 if isinstance(error, OSError) else 2) from None


def _say(line: str, stream: TextIO) -> None:
    print(f"apiary: {line}", file=stream, flush=True)
