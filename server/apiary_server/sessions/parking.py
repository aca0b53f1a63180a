"""Where parked sessions' slots lie in host memory, and how their bytes get there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Parking(Protocol):
    """Takes slots' bytes to host memory and brings them back."""

    def park(self, slot: Tensor) -> Tensor:
        """Copy a slot's bytes, uint8 `[bytes]`, to host memory."""

    def read(self, parked: Tensor) -> Tensor:
        """What `park` returned, when all of it is there to be read."""

    def unpark(self, parked: Tensor, slot: Tensor) -> None:
        """Copy what `park` returned to a slot, which may be used then."""

    def forget(self, parked: Tensor) -> None:
        """Take back what `park` returned."""

    def settle(self, slot: Tensor) -> None:
        """Make sure that a slot may be written to: what was parked from there is not read there any more."""


class PlainParking:
    """Plain memory: what is asked for is done when a call returns.

    One buffer that came back is kept, since sessions come and go in turns, and to touch fresh memory takes
    longer than to copy a slot.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None

    def park(self, slot: Tensor) -> Tensor:
        buffer, self._spare = self._spare, None
        if buffer is None or buffer.shape != slot.shape:
            buffer = torch.empty(slot.shape, dtype=torch.uint8)
        return buffer.copy_(slot)

    def read(self, parked: Tensor) -> Tensor:
        return parked

    def unpark(self, parked: Tensor, slot: Tensor) -> None:
        slot.copy_(parked)

    def forget(self, parked: Tensor) -> None:
        self._spare = parked

    def settle(self, slot: Tensor) -> None:
        pass


class Copy(Protocol):
    """A copy that was started."""

    def done(self) -> bool:
        """Whether it is."""

    def wait(self) -> None:
        """Let the device's further work begin after it; the host does not wait."""

    def join(self) -> None:
        """Have the host wait for it."""


class Copies(Protocol):
    """Copies between a device and pinned host memory that run one after another, beside the device's work."""

    def pin(self, size: int) -> Tensor:
        """Pinned memory, uint8 `[size]`."""

    def unpin(self) -> None:
        """Give pinned memory back that nobody holds any more."""

    def start(self, target: Tensor, source: Tensor) -> Copy:
        """Begin a copy once the device's work so far is done."""


class PinnedParking:
    """Pinned memory: copies run beside the device's work, which waits only where it needs their outcome.

    To pin memory is slow, so buffers are kept for later slots of the same size, as far as the budget allows.

    Args:
        budget: the most bytes to pin; what is parked at once must fit.
        copies: what runs the copies.
    """

    def __init__(self, budget: int, copies: Copies) -> None:
        self._budget = budget
        self._copies = copies
        self._pinned = 0  # bytes of all buffers
        self._free: list[Tensor] = []
        self._leaving: list[tuple[Tensor, Tensor, Copy]] = []  # slots that are being parked, and where

    def park(self, slot: Tensor) -> Tensor:
        parked = self._buffer(slot.numel())
        self._leaving.append((slot, parked, self._copies.start(parked, slot)))
        return parked

    def read(self, parked: Tensor) -> Tensor:
        for _, buffer, copy in self._leaving:
            if buffer is parked:
                copy.join()
        return parked

    def unpark(self, parked: Tensor, slot: Tensor) -> None:
        self._copies.start(slot, parked).wait()

    def forget(self, parked: Tensor) -> None:
        self._free.append(parked)  # may still be copied to or from; whatever uses it next is copied later

    def settle(self, slot: Tensor) -> None:
        self._leaving = [each for each in self._leaving if not each[-1].done()]
        for other, _, copy in self._leaving:
            if _overlap(other, slot):
                copy.wait()

    def _buffer(self, size: int) -> Tensor:
        for at, buffer in enumerate(self._free):
            if buffer.numel() == size:
                return self._free.pop(at)
        if self._pinned + size > self._budget:
            self._pinned -= sum(buffer.numel() for buffer in self._free)
            self._free.clear()
            self._copies.unpin()
        self._pinned += size
        return self._copies.pin(size)


class CudaCopies:
    """As `Copies`, on a stream of its own.

    Torch rounds pinned memory up to a power of two, unless it is told otherwise
    (`PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1`).

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pin(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def unpin(self) -> None:
        torch.accelerator.empty_host_cache()

    def start(self, target: Tensor, source: Tensor) -> Copy:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return _CudaCopy(self._device, self._stream.record_event())


@dataclass(frozen=True, slots=True)
class _CudaCopy:
    device: torch.device
    end: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.end.query())

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.end)

    def join(self) -> None:
        self.end.synchronize()


def parking_of(device: torch.device, budget: int) -> Parking:
    """How slots on a device are parked, up to `budget` bytes."""
    return PinnedParking(budget, CudaCopies(device)) if device.type == "cuda" else PlainParking()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two slots share bytes."""
    first, second = sorted((one, other), key=Tensor.data_ptr)
    return first.data_ptr() + first.nbytes > second.data_ptr()
