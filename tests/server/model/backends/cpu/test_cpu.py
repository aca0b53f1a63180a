from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn
from transformers import LlamaForCausalLM

from apiary_server.model.backends.cpu import Cpu, float32, int8
from apiary_server.model.backends.cpu.library import library
from apiary_server.model.decoder import ForeignStructure
from apiary_server.model.runner import Runner
from tests import tiny
from tests.server.model.test_decoder import FAMILY, logits_of, model_of
from tests.server.model.test_runner import Worker, tokens_of


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("weights", "error"), [("fp32", 1e-5), ("int8", 0.1)])
def test_a_model_of_the_family_gives_its_logits(name: str, weights: str, error: float) -> None:
    config = FAMILY[name]()
    model = model_of(config)
    expected = logits_of(Cpu(model, "fp32").forward, config)
    found = logits_of(Cpu(model, weights).forward, config)  # type: ignore[arg-type]
    assert torch.allclose(found, expected, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("cache", [torch.float32, torch.int8])
def test_alone_and_batched_are_the_same_to_the_bit(
    weights: Literal["fp32", "int8"], cache: torch.dtype
) -> None:
    """Prompts and tokens, joining and leaving, through compactions."""
    if weights == "fp32" and not float32.supported():
        pytest.skip("oneDNN's products depend on the number of rows")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config()).eval()
    backend = Cpu(model, weights)
    parts = [[tokens_of(i, 5 + 7 * i), *([token] for token in tokens_of(50 + i, 40))] for i in range(4)]

    def lines(members: list[int]) -> dict[int, list[torch.Tensor]]:
        worker = Worker(model, cache)
        worker.runner = Runner(backend)
        sessions = {i: worker.session("buzz2(sink=2,window=4,hot=20,cells=10,block=4)") for i in members}
        found: dict[int, list[torch.Tensor]] = {i: [] for i in members}
        for at in range(41 + 3 * (len(members) - 1)):  # each comes three steps after the one before
            here = [i for place, i in enumerate(members) if 0 <= at - 3 * place < 41]
            steps = [parts[i][at - 3 * members.index(i)] for i in here]
            for i, line in zip(here, worker.step([sessions[i] for i in here], steps), strict=True):
                found[i].append(line)
        assert all(cache.evicted for cache, _ in sessions.values())
        return found

    together = lines([0, 1, 2, 3])
    for i in range(4):
        alone = lines([i])[i]
        assert len(alone) == len(together[i]) == 41
        assert all(map(torch.equal, alone, together[i]))


@pytest.mark.parametrize(("weights", "least"), [("fp32", 4), ("int8", 1)])
def test_bytes_of_its_weights(weights: str, least: int) -> None:
    """Panels of 48 outputs, so that some more is kept than there is."""
    config = FAMILY["llama"]()
    model = model_of(config)
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    found = Cpu(model, weights).weight_bytes  # type: ignore[arg-type]
    supported = (float32 if weights == "fp32" else int8).supported()
    assert (found is not None) == supported
    if found is not None:
        count = sum(weight.numel() for weight in linears)
        assert least * count <= found <= 2 * least * count


def test_it_computes_in_float32() -> None:
    with pytest.raises(ForeignStructure, match=r"not in torch\.bfloat16 on cpu"):
        Cpu(model_of(FAMILY["llama"](), torch.bfloat16), "fp32")


def test_without_its_kernel_it_says_so_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = FAMILY["llama"]()
    model = model_of(config)
    expected = logits_of(Cpu(model, "fp32").forward, config)
    names = (
        "kernels.h",
        "elementwise.c",
        "decode.c",
        "chunk.c",
        "float32.c",
        "int8.c",
        "compaction.c",
        "sampling.c",
        "tape.c",
    )
    for name in names:
        (tmp_path / name).write_text("/* not compiled */")
    monkeypatch.setattr("apiary_server.model.backends.cpu.library._HERE", tmp_path)
    library.cache_clear()
    with capture_logs() as logs:
        found, bytes_ = (logits_of(Cpu(model, weights).forward, config) for weights in ("fp32", "int8"))
    library.cache_clear()
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(bytes_, expected, atol=0.1 * float(expected.abs().max()))
    assert [log["log_level"] for log in logs] == ["warning"] * 3
