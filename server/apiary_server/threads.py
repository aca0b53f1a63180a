"""Where torch runs its parallel work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")


def apart(work: Callable[[], _T]) -> _T:
    """Run parallel work of torch in a thread that ends with it.

    Every thread that runs such work gets OpenMP workers of its own, for as long as it lives. Where they are
    more than processors, GNU's OpenMP has all of them sleep between two operations instead of waiting awake,
    and to wake one takes longer than a small operation: the engine's decode steps would take up to twice as
    long because the main thread once loaded the model.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def alone() -> None:
    """Have torch compute in this thread, without OpenMP workers, whatever it asks from now on: for a thread
    that lives long, and has time. No other thread should do its first parallel work meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread; but also of all that have not done any such work
    apart(lambda: torch.set_num_threads(threads))
