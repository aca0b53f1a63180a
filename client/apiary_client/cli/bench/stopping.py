"""How a load is stopped: it cleans up behind itself."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress


def cancel_on_signals() -> None:
    """Have SIGINT and SIGTERM cancel the task that runs.

    The end that others set, such as `timeout`, must not leave sessions behind either. SIGINT is named since
    processes that shells start in the background inherit that it is ignored.
    """
    task = asyncio.current_task()
    if task is not None:
        with suppress(NotImplementedError):  # not on every platform
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
