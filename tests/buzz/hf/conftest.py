from __future__ import annotations

import pytest
from transformers import (
    LlamaConfig,
    PreTrainedModel,
)

from tests.buzz.hf.models import CONFIGS, OWN, model_of, sized


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(sized(CONFIGS[request.param], **OWN.get(request.param, {})))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of(sized(LlamaConfig))


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """Its heads are so wide that entries can be quantised."""
    return model_of(sized(LlamaConfig, head_dim=32))
