from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from apiary_server.model.backends.cpu import float32, int8
from apiary_server.model.backends.cpu.float32 import Avx512
from apiary_server.model.backends.cpu.int8 import Vnni
from apiary_server.model.backends.cpu.linear import Int8, Packed
from apiary_server.model.decoder import Linear

SHAPES = [(96, 40), (576, 1536), (101, 37)]
needs_avx512 = pytest.mark.skipif(not float32.supported(), reason="this processor has no AVX-512")
needs_vnni = pytest.mark.skipif(not int8.supported(), reason="this processor has no AVX-512 VNNI")
AVX512, VNNI = pytest.param(Avx512, marks=needs_avx512), pytest.param(Vnni, marks=needs_vnni)
PRODUCTS = [
    (Packed, 1e-5),
    pytest.param(Avx512, 1e-5, marks=needs_avx512),
    (Int8, 1e-2),
    pytest.param(Vnni, 1e-2, marks=needs_vnni),
]
INT8 = [Int8, VNNI]


def layer(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 0.1, torch.randn(shape[0], generator=generator)


def rows_like(shape: tuple[int, int], count: int) -> Tensor:
    """Some of them with an outlier, as activations have."""
    rows = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1))
    rows[::3, 5] *= 50
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 16, 300])
@pytest.mark.parametrize(("make", "error"), PRODUCTS)
def test_a_product_is_that_of_the_weights(
    make: Callable[[Tensor, Tensor | None], Linear], error: float, shape: tuple[int, int], count: int
) -> None:
    weight, bias = layer(shape)
    rows = rows_like(shape, count)
    for some in (None, bias):
        expected = linear(rows.double(), weight.double(), None if some is None else some.double())
        found = make(weight.clone(), some)(rows)
        off = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(off.max()) < error


@pytest.mark.parametrize("make", INT8)
def test_two_digits_leave_the_weights_as_the_only_error(make: type[Int8 | Vnni]) -> None:
    """With weights that eight bits hold exactly, what is left is that of 16-bit activations."""
    shape = SHAPES[1]
    weight = torch.randint(-126, 127, shape, generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = 127
    rows = rows_like(shape, 7)
    found, expected = make(weight, None)(rows), linear(rows.double(), weight.double())
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-3


@pytest.mark.parametrize("make", [AVX512, *INT8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_the_others(
    make: type[Avx512 | Int8 | Vnni], shape: tuple[int, int]
) -> None:
    weight, bias = layer(shape)
    product, rows = make(weight, bias), rows_like(shape, 75)
    together = product(rows)
    for count in (1, 2, 3, 4, 5, 6, 7, 17, 40):
        assert torch.equal(product(rows[:count]), together[:count])
        assert torch.equal(product(rows[-count:]), together[-count:])


@pytest.mark.parametrize("make", INT8)
def test_rows_of_zeros_stay_zero(make: type[Int8 | Vnni]) -> None:
    weight, _ = layer(SHAPES[0])
    assert not make(weight, None)(torch.zeros(3, 40)).any()
    assert not make(torch.zeros(96, 40), None)(torch.ones(3, 40)).any()


@needs_vnni
def test_the_largest_sums_fit() -> None:
    row = torch.full((1, 2**16), 1.0)
    assert Vnni(torch.full((1, 2**16), -1.0), None)(row).item() == pytest.approx(-(2.0**16), rel=1e-6)
    with pytest.raises(ValueError, match="65537 inputs are more than 65536"):
        Vnni(torch.zeros(1, 2**16 + 1), None)


@pytest.mark.parametrize("make", [AVX512, VNNI])
def test_rows_may_lie_apart(make: type[Avx512 | Vnni]) -> None:
    weight, bias = layer(SHAPES[0])
    rows = torch.randn(5, 80)
    for view in (rows[:, 8:48], torch.randn(40, 5).t()):
        assert torch.equal(make(weight, bias)(view), make(weight, bias)(view.contiguous()))
