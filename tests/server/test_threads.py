from __future__ import annotations

import threading

import pytest

from apiary_server.threads import apart


def test_work_runs_in_a_thread_that_ends() -> None:
    before = set(threading.enumerate())
    worker = apart(threading.current_thread)
    assert worker is not threading.current_thread()
    assert not worker.is_alive()
    assert set(threading.enumerate()) == before


def test_what_goes_wrong_there_goes_wrong_here() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
