"""Fixtures of the benchmarks' tests: the tiny model, and small evaluation files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apiary_bench.quality.bench import Bench, contenders
from apiary_server.model.loader import LoadedModel, load
from tests import tiny
from tests.benchmarks.quality.small import SPECS

WORDS = "river stone lamp garden winter letter engine basket market silver road candle"


def prose(words: int) -> str:
    """Text that never repeats for long."""
    vocabulary = WORDS.split()
    return " ".join(vocabulary[(i * i + i // 7) % len(vocabulary)] for i in range(words))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 4,096 positions, and heads wide enough to be quantised."""
    return tiny.save(tmp_path_factory.mktemp("tiny"), tiny.config(head_dim=32, max_position_embeddings=4096))


@pytest.fixture(scope="session")
def loaded(model_path: Path) -> LoadedModel:
    """That model, ready to run."""
    return load(model_path, torch.device("cpu"), torch.float32, torch.float32)


@pytest.fixture
def bench(loaded: LoadedModel) -> Callable[..., Bench]:
    """A bench over the tiny model with some policies."""

    def make(*specs: str) -> Bench:
        return Bench(loaded, contenders(specs, loaded.rotary.max_positions))

    return make


@pytest.fixture
def ours(bench: Callable[..., Bench]) -> Bench:
    """A bench over the tiny model with three policies."""
    return bench(*SPECS)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation files of two rows each, of short texts."""
    directory = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (directory / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    (directory / "wikitext2.txt").write_text(f" = Heading = \n {prose(4000)} .\n")
    texts = [prose(60), prose(75)]
    write("xsum.jsonl", [{"document": text, "summary": "a river and a stone"} for text in texts])
    write("cnn_dm.jsonl", [{"article": text, "highlights": "a lamp in winter"} for text in texts])
    documents = [{"title": f"Title {i}", "text": prose(8 + i)} for i in range(10)]
    rows: list[dict[str, object]] = [
        {"question": f"where is stone {i}", "answers": ["The river", "road"], "documents": documents}
        for i in range(2)
    ]
    write("qa10.jsonl", rows)
    return directory
