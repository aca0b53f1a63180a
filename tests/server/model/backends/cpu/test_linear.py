from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.nn.functional import linear

from apiary_server.model.backends.cpu import float32, int8
from apiary_server.model.backends.cpu.float32 import Avx512
from apiary_server.model.backends.cpu.int8 import Vnni
from apiary_server.model.backends.cpu.linear import Int8, Packed, turned
from apiary_server.model.decoder import Linear

from .test_codes import quantised_as

SHAPES = [(96, 48), (576, 1536), (101, 37)]
needs_avx512 = pytest.mark.skipif(not float32.supported(), reason="this processor has no AVX-512")
needs_vnni = pytest.mark.skipif(not int8.supported(), reason="this processor has no AVX-512 VNNI")
AVX512, VNNI = pytest.param(Avx512, marks=needs_avx512), pytest.param(Vnni, marks=needs_vnni)
PRODUCTS = [
    (Packed, 1e-5),
    pytest.param(Avx512, 1e-5, marks=needs_avx512),
    (Int8, 3e-2),
    pytest.param(Vnni, 3e-2, marks=needs_vnni),
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


@needs_avx512
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 5, 8, 75])
def test_weights_that_are_bfloat16_give_the_same_in_half_the_memory(
    shape: tuple[int, int], count: int
) -> None:
    weight, bias = layer(shape)
    exact = weight.bfloat16().float()
    product, rows = Avx512(exact, bias), rows_like(shape, count)
    assert product.nbytes == (exact.nbytes / 2 if shape[1] % 2 == 0 else 4 * 144 * shape[1])
    exact[0, 0] = math.nan  # so that all are kept whole
    whole = Avx512(exact, bias)
    assert whole.nbytes == 4 * -(-shape[0] // 48) * 48 * shape[1]
    assert torch.equal(product(rows)[:, 1:], whole(rows)[:, 1:])


@needs_avx512
@pytest.mark.parametrize("shape", [(96, 64), (576, 1536), (101, 96)])
@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 63, 64, 75, 150])
def test_weights_of_a_quantised_file_give_the_same_in_a_third_of_the_memory(
    shape: tuple[int, int], count: int
) -> None:
    weight, bias = layer(shape)
    dequantised = quantised_as(GGMLQuantizationType.Q4_1, weight)
    rows = rows_like(shape, count)
    product = Avx512(dequantised, bias)
    assert product.nbytes == 1.25 * -(-shape[0] // 48) * 48 * shape[1]
    dequantised[0, 0] = math.nan  # so that all are kept whole
    whole = Avx512(dequantised, bias)
    assert whole.nbytes == 4 * -(-shape[0] // 48) * 48 * shape[1]
    assert torch.equal(product(rows)[:, 1:], whole(rows)[:, 1:])
    assert product(rows)[:, 0].isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 13, 37, 40, 64, 576, 1536])
def test_turned_rows_have_the_products_of_rows(length: int) -> None:
    some, others = torch.randn(2, 5, length, generator=torch.Generator().manual_seed(0))
    found, expected = turned(some) @ turned(others).t(), some @ others.t()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [64, 576, 1536, 8960])
def test_turning_spreads_an_outlier_over_the_row(length: int) -> None:
    """As evenly as a random rotation, whose largest element is 4 times the root of their mean square."""
    places = torch.arange(0, length, 7)
    outliers = torch.zeros(len(places), length).scatter_(1, places[:, None], 1.0)
    assert float(turned(outliers).abs().max()) < 4 * length**-0.5


@pytest.mark.parametrize("make", INT8)
def test_an_outlier_leaves_the_others_their_precision(make: type[Int8 | Vnni]) -> None:
    """One that no output asks for, 200 times as large as the others, to which it would leave two bits."""
    shape = SHAPES[1]
    weight, _ = layer(shape)
    weight[:, 5] = 0
    rows = rows_like(shape, 7)
    rows[:, 5] = 200
    found, expected = make(weight, None)(rows), linear(rows.double(), weight.double())
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 0.06


@needs_vnni
@pytest.mark.parametrize("shape", [*SHAPES, (33, 1000)])
def test_the_kernel_does_what_torch_does(shape: tuple[int, int]) -> None:
    weight, bias = layer(shape)
    rows = rows_like(shape, 75)
    found, expected = Vnni(weight, bias)(rows), Int8(weight, bias)(rows)
    assert float((found - expected).norm() / expected.norm()) < 1e-4  # a code at a tie may differ by one


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("make", "_"), PRODUCTS)
def test_there_may_be_no_rows(
    make: Callable[[Tensor, Tensor | None], Linear], _: float, shape: tuple[int, int]
) -> None:
    """As in the last layer of a step in which no row asks for logits."""
    weight, bias = layer(shape)
    assert make(weight, bias)(torch.empty(0, shape[1])).shape == (0, shape[0])


@pytest.mark.parametrize("make", INT8)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(make: type[Int8 | Vnni], shape: tuple[int, int], odd: float) -> None:
    weight, bias = layer(shape)
    rows = rows_like(shape, 9)
    found = make(weight, bias)(rows)
    rows[4, 3] = odd
    other = make(weight, bias)(rows)
    assert other[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(other[others], found[others])


@pytest.mark.parametrize("make", INT8)
def test_rows_of_zeros_stay_zero(make: type[Int8 | Vnni]) -> None:
    weight, _ = layer(SHAPES[0])
    assert not make(weight, None)(torch.zeros(3, 48)).any()
    assert not make(torch.zeros(96, 48), None)(torch.ones(3, 48)).any()


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
    for view in (rows[:, 8:56], torch.randn(48, 5).t()):
        assert torch.equal(make(weight, bias)(view), make(weight, bias)(view.contiguous()))
