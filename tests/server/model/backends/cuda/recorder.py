"""What a CUDA graph does, on any device: operations are recorded with the tensors that they read and write,
and replayed without the function that asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apiary_server.model.backends.cuda.graphs import Compute


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Runs operations, and keeps what they were. What they changed is put back at the end: recording a graph
    computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._remember(tensors(args, kwargs))
        output = func(*args, **kwargs)
        self._made |= {storage(made) for made in tensors(output)} - {storage(t) for t in tensors(args)}
        self._operations.append((func, args, kwargs, output))
        return output

    def _remember(self, changed: list[Tensor]) -> None:
        for tensor in changed:
            if storage(tensor) not in self._made and storage(tensor) not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[storage(tensor)] = (whole, whole.clone())

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for whole, before in self._before.values():
            whole.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, output in self._operations:
            inputs = {storage(tensor) for tensor in tensors(args, kwargs)}
            if not func._schema.is_mutable and inputs & {storage(made) for made in tensors(output)}:
                continue  # a view
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tensors(output), tensors(again), strict=True):
                    old.copy_(new)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """As `Graphs`. `graphs` are those that were made."""

    def __init__(self) -> None:
        self.graphs: list[Recorded] = []

    def __call__(self, compute: Compute) -> Compute:
        self.graphs.append(Recorded(compute))
        return self.graphs[-1]


class Recorded:
    """One function: how often it was run, recorded and replayed."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._recording: Recording | None = None
        self.runs = self.replays = 0

    def __call__(self) -> Tensor:
        self.runs += 1
        if self.runs == 1:
            return self._compute()
        if self._recording is None:
            self._recording = Recording()
            with self._recording:
                self.output = self._compute()
        self._recording.replay()
        self.replays += 1
        return self.output
