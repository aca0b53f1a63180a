"""The compiled functions."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor

from apiary_server.model.backends.cpu import tape
from apiary_server.model.backends.cpu.library import library


class Kernel:
    """A function `apiary_NAME` by which a team of threads does a task, which begins with its number of rows;
    it is recorded instead where a tape is.

    Args:
        source: the C file's name.
        name: the function's, which returns 0, or something else where there was no memory.

    Raises:
        OSError: it was not built.
    """

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        self._address = ctypes.cast(library(source)[f"apiary_{name}"], c_void_p).value
        self._player = tape.Player()

    def output(self, *shape: int) -> Tensor:
        """Memory for float32 results."""
        recording = tape.current()
        return torch.empty(shape) if recording is None else recording.output(shape)

    def __call__(self, task: ctypes.Structure, *, alone: bool = False) -> None:
        """Do it, by this thread `alone` or with others. A thread that has ever had any keeps them, so that
        little work is better done alone in those that do no other (see `apiary_server.threads`).

        Raises:
            MemoryError: there is not enough.
        """
        recording = tape.current()
        if recording is not None:
            recording.append(self._name, self._address, task)
        elif not self._player.one(self._address, task, alone=alone):
            raise MemoryError(f"no memory for {self._name}")


def registered(namespace: str, source: str, **operators: Callable[..., Any]) -> torch.library.Library:
    """Let operators of `buzz.operators` be done by kernels where their tensors are on a CPU, for as long as
    what this returns is kept.

    Args:
        namespace: the operators'.
        source: the kernels' C file.
        operators: by the name of both, what is done: a function of the kernel and the operator's arguments.

    Raises:
        OSError: the kernels were not built.
    """
    found = torch.library.Library(namespace, "IMPL")
    for name, operator in operators.items():
        found.impl(name, functools.partial(operator, Kernel(source, name)), "CPU")
    return found
