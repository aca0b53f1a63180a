from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from apiary_server.model.backends.cpu import Cpu
from apiary_server.model.backends.cpu.library import library
from apiary_server.model.decoder import ForeignStructure
from tests.server.model.test_decoder import FAMILY, logits_of, model_of


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("weights", "error"), [("fp32", 1e-5), ("int8", 0.1)])
def test_a_model_of_the_family_gives_its_logits(name: str, weights: str, error: float) -> None:
    config = FAMILY[name]()
    model = model_of(config)
    expected = logits_of(Cpu(model, "fp32").forward, config)
    found = logits_of(Cpu(model, weights).forward, config)  # type: ignore[arg-type]
    assert torch.allclose(found, expected, atol=error * float(expected.abs().max()))


def test_it_computes_in_float32() -> None:
    with pytest.raises(ForeignStructure, match=r"not in torch\.bfloat16 on cpu"):
        Cpu(model_of(FAMILY["llama"](), torch.bfloat16), "fp32")


def test_without_its_kernel_it_says_so_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = FAMILY["llama"]()
    model = model_of(config)
    expected = logits_of(Cpu(model, "fp32").forward, config)
    for name in ("kernels.h", "elementwise.c", "decode.c", "chunk.c", "int8.c"):
        (tmp_path / name).write_text("/* not compiled */")
    monkeypatch.setattr("apiary_server.model.backends.cpu.library._HERE", tmp_path)
    library.cache_clear()
    with capture_logs() as logs:
        found, int8 = (logits_of(Cpu(model, weights).forward, config) for weights in ("fp32", "int8"))
    library.cache_clear()
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(int8, expected, atol=0.1 * float(expected.abs().max()))
    assert [log["log_level"] for log in logs] == ["warning"] * 3
