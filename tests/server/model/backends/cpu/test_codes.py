from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from apiary_server.model.backends.cpu.codes import GROUP, decomposed

Q = GGMLQuantizationType
SIMPLE = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]


def quantised_as(kind: GGMLQuantizationType, weight: Tensor) -> Tensor:
    """What a file of this format gives back."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def random(outputs: int = 40, inputs: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("kind", SIMPLE)
def test_the_simple_formats_are_recognised_exactly(kind: GGMLQuantizationType) -> None:
    weight = quantised_as(kind, random())
    weight[3] = 0
    found = decomposed(weight)
    assert found is not None
    assert (found.codes.dtype, found.codes.shape) == (torch.uint8, (40, 96))
    assert found.scales.shape == found.least.shape == (40, 96 // GROUP)
    scales, least = (part.double().repeat_interleave(GROUP, dim=1) for part in (found.scales, found.least))
    assert torch.equal((scales * found.codes + least).float(), weight)


def test_formats_may_be_mixed() -> None:
    parts = [quantised_as(kind, random(seed=number)) for number, kind in enumerate(SIMPLE)]
    found, alone = decomposed(torch.cat(parts)), decomposed(parts[1])
    assert found is not None
    assert alone is not None
    assert torch.equal(found.codes[40:80], alone.codes)


def test_what_is_not_of_such_a_file_is_left() -> None:
    assert decomposed(random()) is None
    assert decomposed(random().bfloat16().float()) is None
    assert decomposed(quantised_as(Q.Q8_0, random())[:, :80]) is None, "a group is cut"
    assert decomposed(torch.empty(0, 96)) is None
    for value in (torch.nan, torch.inf, 0.01234567):
        weight = quantised_as(Q.Q4_1, random(400))
        weight[-1, -1] = value
        assert decomposed(weight) is None


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
def test_an_offset_that_is_large_beside_its_steps(step: float) -> None:
    """Sums are rounded then, and codes are those that round to the same."""
    weight = quantised_as(Q.Q4_1, random() * step + 3)
    found = decomposed(weight)
    assert found is not None
    scales, least = (part.double().repeat_interleave(GROUP, dim=1) for part in (found.scales, found.least))
    assert torch.equal((scales * found.codes + least).float(), weight)
