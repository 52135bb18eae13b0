"""Ranks whose batches differ in kind stay in step: DeepSpeed on two ranks equals one process that sees both batches.

One rank has images, regions and ``<ground>`` where the other has none of them, and they change places. Without dummies
in the same order through the same code this hangs or aborts under ZeRO-3, and is silently wrong under ZeRO-2.
"""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import pytest
import torch
from transformers.integrations import HfDeepSpeedConfig

from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user
from tests.harness import run_ranks

pytestmark = pytest.mark.integration

ALL = [user(image(1), text("what is "), region(3, 4, 20, 25), text("?")), assistant("a ring"), user("where?")]
SCRIBBLE = {"type": "region", "scribble": [[3, 4], [20, 25], [30, 5]]}
KINDS: dict[str, Any] = {
    "all": [*ALL, assistant(text("red circle "), region(4, 5, 20, 22), region(9, 9, 30, 20))],
    "shapes": [user(image(4), text("what is "), SCRIBBLE, region(3, 4, 20, 25)), assistant("a ring")],
    "text only": [user("how many crosses?"), assistant("two")],
    "image only": [user(image(2, 90, 33), text("what?")), assistant("a ring")],
    "no region": [user(image(3), text("where?")), grounding_turn()],
    "no ground": ALL[:2],
}
STEPS = [("all", "text only"), ("text only", "image only"), ("no region", "shapes"), ("no ground", "all")]
LEARNING_RATE = 0.05


def built(image_mode: str) -> tuple[Any, dict[str, Any]]:
    """The same model and batches on every rank; every part learns."""
    options = {"num_region_tokens": 5, "boxes_per_phrase": 3}
    model, processor = tiny_mllm(region_encoder="prompter", image_mode=image_mode, **options)
    batches = {name: model_inputs(processor.encode(turns, return_labels=True)) for name, turns in KINDS.items()}
    for batch in batches.values():
        batch["ground_queries"] = torch.linspace(-1, 1, 24).repeat(len(batch["ground_image_index"]), 1)
    return model.train(), batches


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    output = model(**batch)
    boxes = output.pred_boxes.sum() + output.text_prompted_boxes[:, 1].sum()
    return output.loss + boxes + output.ground_embeds[:, 0].sum()


@functools.cache
def trained_alone(image_mode: str) -> dict[str, torch.Tensor]:
    model, batches = built(image_mode)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for names in STEPS:
        optimizer.zero_grad()
        torch.stack([loss_of(model, batches[name]) for name in names]).mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained_by_deepspeed(rank: int, stage: int, image_mode: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after the steps, and losses of an evaluation in which the ranks' batches differ again."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, batches = built(image_mode)
    zero = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": 2000,
        "stage3_param_persistence_threshold": 0,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    # Kept alive: it is how transformers knows of ZeRO-3 (the model is built, so nothing is partitioned by it).
    known = HfDeepSpeedConfig(config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for names in STEPS:
        engine.backward(loss_of(engine, batches[names[rank]]))
        engine.step()
    engine.eval()
    with torch.no_grad():
        evaluated = [float(engine(**batches[names[rank]]).loss) for names in STEPS]
    assert known.is_zero3() == (stage == 3)
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in parameters.items()}, evaluated


@pytest.mark.parametrize(("stage", "image_mode"), [(2, "pad"), (3, "pad"), (3, "anyres")])
def test_unlike_ranks_train_as_one_process_on_both_batches(stage: int, image_mode: str) -> None:
    detail = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    results = run_ranks(trained_by_deepspeed, 2, stage, image_mode, timeout=240, env=detail)
    alone = trained_alone(image_mode)
    start = dict(built(image_mode)[0].named_parameters())
    moved = [name for name, value in alone.items() if not torch.equal(value, start[name])]
    assert any("grounding_head" in name for name in moved)
    assert any("region_projector" in name for name in moved)
    assert any("vision_tower" in name for name in moved)
    assert any("image_newline" in name for name in moved) == (image_mode == "anyres")
    assert any("ordinals" in name for name in moved)
    for weights, evaluated in results:
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, atol=2e-6, rtol=1e-4, msg=f"{name} at stage {stage}")
        assert all(loss > 0 for loss in evaluated)
