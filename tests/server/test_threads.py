from __future__ import annotations

import threading

import pytest
import torch

from apiary_server.threads import alone, apart


def test_work_runs_in_a_thread_that_ends() -> None:
    before = set(threading.enumerate())
    worker = apart(threading.current_thread)
    assert worker is not threading.current_thread()
    assert not worker.is_alive()
    assert set(threading.enumerate()) == before


def test_what_goes_wrong_there_goes_wrong_here() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_a_thread_computes_alone() -> None:
    """And no other, not even those that begin later."""
    counts = []

    def work() -> None:
        alone()
        counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        apart(work)
        counts += [torch.get_num_threads(), apart(torch.get_num_threads)]
    finally:
        torch.set_num_threads(before)
    assert counts == [1, 3, 3]
