"""What the machine can do at best: memory bandwidth and the rate of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Self

import torch

_COPY_BYTES = 2**28  # of each tensor: far beyond the caches
_SQUARES = (1024, 2048, 3072)  # sides of the matrices; the best counts
_REPEATS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The best of several measurements, with as many threads as the engine computes with.

    Attributes:
        threads: of torch.
        copy: bytes per second of a copy between tensors of 256 MiB, both those read and those written, as in
            STREAM (https://www.cs.virginia.edu/stream): what the hardware reads in order to write is not
            counted.
        read: bytes per second of the sum of such a tensor; no floor is made of it.
        gemm: floating-point operations per second of a square product in the dtype that the model computes
            in, two for each multiplication and addition.
        int8: the same of integers of eight bits with sums of 32 (`torch._int_mm`); None where the weights
            are not of such.
    """

    threads: int
    copy: float
    read: float
    gemm: float
    int8: float | None

    @classmethod
    def measure(cls, dtype: torch.dtype, *, int8: bool) -> Self:
        """Measure on the CPU, in some seconds."""
        source = torch.ones(_COPY_BYTES // 4)
        target = torch.empty_like(source)
        return cls(
            threads=torch.get_num_threads(),
            copy=2 * _COPY_BYTES / _best(lambda: target.copy_(source)),
            read=_COPY_BYTES / _best(source.sum),
            gemm=max(_product(side, dtype, torch.mm) for side in _SQUARES),
            int8=max(_product(side, torch.int8, torch._int_mm) for side in _SQUARES) if int8 else None,
        )

    def best(self, other: Ceilings) -> Ceilings:
        """The better of two measurements of one machine: what else ran there can only have lowered them."""
        return Ceilings(
            threads=self.threads,
            copy=max(self.copy, other.copy),
            read=max(self.read, other.read),
            gemm=max(self.gemm, other.gemm),
            int8=None if self.int8 is None or other.int8 is None else max(self.int8, other.int8),
        )


def _product(
    side: int, dtype: torch.dtype, multiply: Callable[[torch.Tensor, torch.Tensor], object]
) -> float:
    """Operations per second; the right side is transposed in memory, as weights are."""
    left, right = (torch.ones(side, side, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: multiply(left, right.t()))


def _best(work: Callable[[], object]) -> float:
    """The shortest time, in seconds."""
    times = []
    for _ in range(_REPEATS):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return min(times)
