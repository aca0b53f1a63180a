"""A GPU that is not there: tensors with its device, shapes and dtypes, but without values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.server.model.backends.cuda.recorder import tensors

aten = torch.ops.aten


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Whatever is made on this device inside is fake; whoever looks at a value gets an exception."""
    with FakeTensorMode(), _Indexing():
        yield torch.device("cuda:0")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, copies between them, and whatever mixes their tensors."""

    _WAITING = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.is_nonzero)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **kwargs or {})
        devices = {tensor.device.type for tensor in tensors(args, kwargs, output)}
        if func.overloadpacket in self._WAITING or len(devices) > 1:
            raise AssertionError(f"{func} on {devices}")
        return output


class _Indexing(TorchFunctionMode):
    """Indexing and copying by operators: Python's own syntax asks a GPU's driver first."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__getitem__:
            view, index = _basic(*args)
            return aten.index.Tensor(view, index) if index else view
        if func is Tensor.__setitem__:
            target, key, value = args
            view, index = _basic(target, key)
            value = value if isinstance(value, Tensor) else torch.full((), value, device=view.device)
            if index:
                aten.index_put_.default(view, index, value.to(view.dtype))
            else:
                aten.copy_.default(view, value)
            return None
        if func is torch.tensor and not len(args[0]):
            return torch.empty(0, **kwargs or {})
        if func is Tensor.copy_:
            return aten.copy_.default(*args)
        return func(*args, **kwargs or {})


def _basic(tensor: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that integers, slices, None and ... in a key make, and the tensors by which to index it."""
    keys = list(key) if isinstance(key, tuple) else [key]
    taken = sum(part is not None and part is not Ellipsis for part in keys)
    for at, part in enumerate(keys):
        if part is Ellipsis:
            keys[at : at + 1] = [slice(None)] * (tensor.dim() - taken)
    index: list[Tensor | None] = []
    for part in keys:
        dim = len(index)
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        index.append(part if isinstance(part, Tensor) else None)
    return tensor, index if any(part is not None for part in index) else []
