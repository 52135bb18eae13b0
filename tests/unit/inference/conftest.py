"""One tiny model for all tests of inference: untrained, and made to say ``<ground>`` every few tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cloc_mllm.inference.predictor import Predictor
from tests.builders_mllm import tiny_mllm


def keen_to_ground(model: Any, processor: Any) -> None:
    """Make an untrained model say ``<ground>`` about every third token, whatever it is asked."""
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[processor.ground_token_id] = (
            weight[:350].std() * torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
        )


@pytest.fixture(scope="session")
def mllm() -> tuple[Any, Any]:
    model, processor = tiny_mllm(grounding="head")
    keen_to_ground(model, processor)
    return model, processor


@pytest.fixture
def predictor(mllm: tuple[Any, Any]) -> Predictor:
    return Predictor(*mllm)
