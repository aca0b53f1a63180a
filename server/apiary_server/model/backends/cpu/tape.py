"""Kernels that are recorded once, and then run one after the other by a single call: what a CUDA graph is on
a GPU, and for any number of rows."""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_double, c_int, c_int64, c_void_p
from weakref import finalize

import torch
from torch import Tensor

from apiary_server.model.backends.cpu.library import library

_current: ContextVar[Tape | None] = ContextVar("tape", default=None)


class _Operation(ctypes.Structure):
    """As in `tape.c`."""

    _fields_ = (("kernel", c_void_p), ("task", c_void_p), ("seconds", c_double))


class Player:
    """Runs kernels.

    Raises:
        OSError: it was not built.
    """

    def __init__(self) -> None:
        self._play = library("tape").apiary_play
        self._play.argtypes, self._play.restype = [c_void_p, c_int64, c_int64, c_int], c_int

    def __call__(self, operations: ctypes.Array[_Operation], rows: int, *, alone: bool = False) -> bool:
        """Run them one after the other, by torch's threads or by this one `alone`; False: one of them had no
        memory, and those behind it did not run."""
        return not self._play(operations, len(operations), rows, alone)

    def one(self, kernel: int | None, task: ctypes.Structure, *, alone: bool = False) -> bool:
        """Run one, as it is not recorded."""
        rows = c_int64.from_buffer(task).value
        return self((_Operation * 1)(_Operation(kernel, ctypes.addressof(task))), rows, alone=alone)


class Tape:
    """What kernels were asked for while it was `recording`. Nothing else that happened then is repeated, and
    what their tasks point to has to stay where it is.

    Raises:
        OSError: the kernels were not built.
    """

    def __init__(self) -> None:
        self._player = Player()
        self._tasks: list[tuple[str, int | None, ctypes.Structure]] = []
        self._free: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._operations = (_Operation * 0)()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Have kernels that are called here recorded, and not run."""
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)
        operations = (_Operation(kernel, ctypes.addressof(task)) for _, kernel, task in self._tasks)
        self._operations = (_Operation * len(self._tasks))(*operations)

    @property
    def seconds(self) -> dict[str, float]:
        """How long the kernels of each name took, when it was played last."""
        taken: Counter[str] = Counter()
        for (name, _, _), operation in zip(self._tasks, self._operations, strict=True):
            taken[name] += operation.seconds
        return dict(taken)

    def append(self, name: str, address: int | None, task: ctypes.Structure) -> None:
        """Record a kernel and a copy of its task."""
        self._tasks.append((name, address, type(task).from_buffer_copy(task)))

    def output(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for what a kernel computes. It is used again when no tensor has it any more: no kernel that
        is recorded later will read it."""
        free = self._free[shape]
        memory = free.pop() if free else torch.empty(shape)
        lent = memory.numpy().data
        finalize(lent, free.append, memory)
        return torch.frombuffer(lent, dtype=memory.dtype).view(shape)

    def __call__(self, rows: int) -> None:
        """Run what was recorded, on the first rows of its memory.

        Raises:
            MemoryError: a kernel had not enough.
        """
        if not self._player(self._operations, rows):
            raise MemoryError(f"no memory for a step of {rows} rows")


def current() -> Tape | None:
    """The tape that is recording in this thread."""
    return _current.get()
