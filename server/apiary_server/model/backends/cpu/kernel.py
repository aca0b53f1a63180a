"""The compiled functions."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_void_p

import torch
from torch import Tensor

from apiary_server.model.backends.cpu import tape
from apiary_server.model.backends.cpu.library import library


class Kernel:
    """A function `apiary_NAME` that does a task, which begins with its number of rows; it is recorded instead
    where a tape is.

    Args:
        source: the C file's name.
        name: the function's, which returns 0, or something else where there was no memory.

    Raises:
        OSError: it was not built.
    """

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        self._function = library(source)[f"apiary_{name}"]
        self._function.argtypes, self._function.restype = [c_void_p], c_int
        self._address = ctypes.cast(self._function, c_void_p).value

    def output(self, *shape: int) -> Tensor:
        """Memory for float32 results."""
        recording = tape.current()
        return torch.empty(shape) if recording is None else recording.output(shape)

    def __call__(self, task: ctypes.Structure) -> None:
        """Do it.

        Raises:
            MemoryError: there is not enough.
        """
        recording = tape.current()
        if recording is not None:
            recording.append(self._name, self._address, task)
        elif self._function(byref(task)):
            raise MemoryError(f"no memory for {self._name}")
