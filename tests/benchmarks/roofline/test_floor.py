"""Floors, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.floor import Linear, Load, Model, Operation, floors, operations
from apiary_bench.roofline.part import Part
from apiary_server.sessions.pool import Geometry
from buzz import parse
from tests import tiny

GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=32, dtype=torch.float32)
LAYERS = [
    Linear(10, 20, bias=False),
    Linear(20, 5, bias=True),
]
LOAD = Load(rows=3, entries=100, packed=0)


def model(*, int8: bool = False, cache: torch.dtype = torch.float32) -> Model:
    return Model(
        linears=tuple(LAYERS),
        hidden=10,
        vocabulary=7,
        query_heads=4,
        geometry=Geometry(2, 2, 32, cache),
        dtype=torch.float32,
        int8=int8,
        stored=1 if int8 else 4,
    )


def found(part: Part, made: Model, policy: str, load: Load = LOAD) -> list[tuple[float, float, bool]]:
    return [
        (operation.bytes, operation.operations, operation.int8)
        for operation in operations(made, parse(policy), load)
        if operation.part is part
    ]


def test_linear_layers() -> None:
    assert found(Part.LINEAR, model(), "window") == [
        (4 * 200 + 3 * 30 * 4, 2 * 3 * 200, False),
        (4 * 100 + 4 * 5 + 3 * 25 * 4, 2 * 3 * 100, False),
    ]
    # a byte for each weight and four for each scale
    assert found(Part.LINEAR, model(int8=True), "window") == [
        (200 + 4 * 20 + 3 * 30 * 4, 2 * 3 * 200, True),
        (100 + 4 * 5 + 4 * 5 + 3 * 25 * 4, 2 * 3 * 100, True),
    ]
    assert found(Part.LINEAR, replace(model(), stored=2), "window") == [
        (2 * 200 + 3 * 30 * 4, 2 * 3 * 200, False),
        (2 * 100 + 4 * 5 + 3 * 25 * 4, 2 * 3 * 100, False),
    ]


def test_attention() -> None:
    entry = 2 * 2 * 32  # of keys and values, all heads
    ends = 2 * 3 * 4 * 32 * 4
    arithmetic = 2 * 2 * 100 * 4 * 32
    plain = (103 * entry * 4 + ends, arithmetic, False)
    assert found(Part.ATTENTION, model(), "window") == [plain] * 2
    half = (103 * entry * 2 + ends, arithmetic, False)
    assert found(Part.ATTENTION, model(cache=torch.bfloat16), "window") == [half] * 2
    eight = (103 * (entry + 2 * 2 * 4) + ends, arithmetic, False)
    assert found(Part.ATTENTION, model(cache=torch.int8), "window") == [eight] * 2
    assert found(Part.ATTENTION, model(), "h2o") == [plain] * 2


def test_quantised_entries() -> None:
    load = Load(rows=3, entries=100, packed=60)
    packed = 2 * 2 * (16 + 4)  # four bits each, and a minimum and a step in float16
    dense = 2 * 2 * 32 * 4
    expected = (43 * dense + 60 * packed + 2 * 3 * 4 * 32 * 4, 2 * 2 * 100 * 4 * 32, False)
    assert found(Part.ATTENTION, model(), "window(kivi=4)", load) == [expected] * 2


def test_scores_embedding_and_sampling() -> None:
    assert found(Part.SCORES, model(), "window") == []
    assert found(Part.SCORES, model(), "h2o") == [(2 * 100 * 2 * 4, 100 * 4, False)] * 2
    assert found(Part.EMBEDDING, model(), "h2o") == [(2 * 3 * 10 * 4, 0, False)]
    assert found(Part.SAMPLING, model(), "h2o") == [(3 * 7 * 4, 3 * 7, False)]


def test_an_operation_takes_what_its_scarcer_resource_takes() -> None:
    ceilings = Ceilings(threads=1, copy=100.0, read=1.0, gemm=10.0, int8=40.0)
    by_memory = Operation(Part.LINEAR, 1000, 50)
    by_arithmetic = Operation(Part.LINEAR, 1000, 500)
    integers = Operation(Part.SCORES, 1000, 500, int8=True)
    assert [each.seconds(ceilings) for each in (by_memory, by_arithmetic, integers)] == [10.0, 50.0, 12.5]
    assert floors([by_memory, integers, by_arithmetic], ceilings) == {Part.LINEAR: 60.0, Part.SCORES: 12.5}


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_a_model_s_linear_layers(tmp_path: Path, changes: dict[str, bool]) -> None:
    path = tiny.save(tmp_path, tiny.config(**changes))
    made = Model.of(path, GEOMETRY, torch.float32, int8=False)
    bias = changes.get("attention_bias", False)
    layer = [
        Linear(32, 32 + 16 + 16, bias),  # queries, keys and values read the same rows
        Linear(32, 32, bias),
        Linear(32, 2 * 48, False),  # gate and up
        Linear(48, 32, False),
    ]
    assert made.linears == (*layer, *layer, Linear(32, 259, False))
    assert (made.hidden, made.vocabulary, made.query_heads) == (32, 259, 4)
    assert made.stored == 4


def test_how_weights_are_kept(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, tiny.config())
    weights = sum(
        layer.inputs * layer.outputs for layer in Model.of(path, GEOMETRY, torch.bfloat16, int8=True).linears
    )
    stored = [
        Model.of(path, GEOMETRY, torch.float32, int8=False, kept=weights * 5 // 4).stored,
        Model.of(path, GEOMETRY, torch.bfloat16, int8=False).stored,
        Model.of(path, GEOMETRY, torch.float32, int8=True, kept=weights * 5 // 4).stored,
    ]
    assert stored == [1.25, 2, 1]
