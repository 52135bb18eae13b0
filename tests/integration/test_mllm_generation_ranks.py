"""Ranks under ZeRO-3 generate in step, whatever each of them is shown, and say what one process says.

Weights are gathered by all ranks together. Where one rank encodes an image before its prompt is embedded and another
none at all, or where one answers in five tokens and another in twelve, they would gather different weights, or wait.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from transformers.integrations import HfDeepSpeedConfig

from tests.builders_mllm import image, region, text, tiny_mllm, user
from tests.harness import run_ranks

pytestmark = pytest.mark.integration

QUESTIONS: list[list[Any]] = [
    [user(image(1), text("what is "), region(3, 4, 20, 25), text("?"))],
    [user("how many crosses?")],
    [user(image(2), image(3), text("which is red?"))],
]
ROUNDS = [(0, 1, 12, 5), (1, 2, 5, 12), (2, 0, 9, 9), (1, 1, 4, 7)]
"""In each round the question of either rank and how many tokens it may answer in."""


def built() -> tuple[Any, Any]:
    model, processor = tiny_mllm()
    model.generation_config.sequence_bias = [[[processor.ground_token_id], 10.0]]
    return model, processor


def answer(model: Any, processor: Any, question: int, length: int) -> tuple[list[int], torch.Tensor]:
    inputs = processor.encode(QUESTIONS[question], add_generation_prompt=True)
    output = model.generate_grounded(**inputs, max_new_tokens=length, min_new_tokens=length)
    return output.sequences[0, output.prompt_length : output.prompt_length + length].tolist(), output.pred_boxes


def answered_by_rank(rank: int) -> list[tuple[list[int], torch.Tensor]]:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, processor = built()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000},
    }
    known = HfDeepSpeedConfig(config)  # kept alive: it is how transformers knows of ZeRO-3
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    assert known.is_zero3()
    return [answer(engine.module, processor, turn[rank], turn[2 + rank]) for turn in ROUNDS]


def test_unlike_ranks_generate_what_one_process_does() -> None:
    results = run_ranks(answered_by_rank, 2, timeout=240, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})
    model, processor = built()
    boxes = 0
    for rank, answers in enumerate(results):
        for turn, (tokens, found) in zip(ROUNDS, answers, strict=True):
            expected, theirs = answer(model, processor, turn[rank], turn[2 + rank])
            assert tokens == expected, turn
            torch.testing.assert_close(found, theirs, equal_nan=True, atol=1e-5, rtol=1e-4)
            boxes += len(found)
    assert boxes > 4
