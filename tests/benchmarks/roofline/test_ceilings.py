"""What a machine can do, measured in small."""

from __future__ import annotations

import pytest
import torch

from apiary_bench.roofline import ceilings
from apiary_bench.roofline.ceilings import Ceilings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "_SQUARES", (16, 32))


@pytest.mark.parametrize("int8", [False, True])
def test_the_rates_are_bytes_and_operations_over_the_shortest_time(
    monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    now = 0.0

    def clock() -> float:  # each time it is asked twice, more passes: the first repeat is the shortest
        nonlocal now
        now += 0.5
        return now**2

    monkeypatch.setattr(ceilings, "perf_counter", clock)
    found = Ceilings.measure(torch.float32, int8=int8)
    repeats = ceilings._REPEATS

    def shortest(number: int) -> float:
        first = number * repeats + 0.5
        return (first + 0.5) ** 2 - first**2

    assert found.threads == torch.get_num_threads()
    assert found.copy == 2 * 2**20 / shortest(0)
    assert found.read == 2**20 / shortest(1)
    assert found.gemm == max(2 * 16**3 / shortest(2), 2 * 32**3 / shortest(3))
    assert found.int8 == (max(2 * 16**3 / shortest(4), 2 * 32**3 / shortest(5)) if int8 else None)


def test_of_two_measurements_the_best_counts() -> None:
    one = Ceilings(threads=2, copy=1.0, read=4.0, gemm=5.0, int8=8.0)
    other = Ceilings(threads=2, copy=2.0, read=3.0, gemm=6.0, int8=7.0)
    best = Ceilings(threads=2, copy=2.0, read=4.0, gemm=6.0, int8=8.0)
    assert one.best(other) == other.best(one) == best
    without = Ceilings(threads=2, copy=1.0, read=4.0, gemm=5.0, int8=None)
    assert without.best(without) == without
