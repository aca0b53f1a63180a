"""Linear layers by our own kernels, `float32.c` and `int8.c`: what they share, as in `panels.h`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from apiary_server.model.backends.cpu.kernel import Kernel
from apiary_server.model.backends.cpu.library import library
from apiary_server.model.backends.cpu.pages import HugePages

COLUMNS = 48  # outputs that a kernel takes together


class _Linear(ctypes.Structure):
    """As in `panels.h`."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "inputs", "outputs", "kind")),
        ("input", c_void_p),
        ("input_row", c_int64),
        *((name, c_void_p) for name in ("weights", "bias", "output", "scales", "offsets", "signs", "room")),
    )


def supported(kernel: str) -> bool:
    """Whether a kernel was built, and this processor has its instructions."""
    try:
        return bool(library(kernel)[f"apiary_{kernel}_supported"]())
    except OSError:
        return False


class Panels:
    """A linear layer whose weight lies in panels of `COLUMNS` outputs, in the order in which they are read.
    Not thread-safe.

    Args:
        kernel: its name.
        shape: outputs and inputs.
        weights: the panels, `[outputs / COLUMNS, rounded up, ...]`, which are copied.
        bias: float32 `[outputs]`.
        memory: for the copy; None: memory of its own.
        scales: of weights in eight bits, float32 `[outputs, rounded up]`.
        offsets: of such, int32 `[outputs, rounded up]`.
        signs: of such, float32 `[inputs]`.
        kind: of the panels, where the kernel has several.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(
        self,
        kernel: str,
        shape: torch.Size,
        weights: Tensor,
        bias: Tensor | None,
        memory: HugePages | None,
        scales: Tensor | None = None,
        offsets: Tensor | None = None,
        signs: Tensor | None = None,
        kind: int = 0,
    ) -> None:
        self._linear = Kernel(kernel, f"{kernel}_linear")
        outputs, inputs = shape
        self._bias = None if bias is None else pad(bias, (0, -outputs % COLUMNS))
        self._weights = (memory or HugePages()).keep(weights)
        self._kept = scales, offsets, signs  # which the task points to, as to those above
        self._task = _Linear(
            inputs=inputs,
            outputs=outputs,
            kind=kind,
            weights=self._weights.data_ptr(),
            bias=_address(self._bias),
            scales=_address(scales),
            offsets=_address(offsets),
            signs=_address(signs),
        )

    @property
    def nbytes(self) -> int:
        """Of the weight, as it is kept."""
        return self._weights.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        task = self._task
        output = self._linear.output(len(rows), task.outputs)
        task.rows = len(rows)
        task.input, task.input_row = rows.data_ptr(), rows.stride(0)
        task.output = output.data_ptr()
        room = None if task.signs is None else self._linear.output(len(rows), -(-task.inputs // 4) + 1)
        task.room = _address(room)
        self._linear(task)
        return output


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
