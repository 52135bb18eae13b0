"""What a step is said to cost, against the same passes with real tensors and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.training.planning.costs import ImageCost, PartCost, image_cost
from cloc_mllm.training.planning.explain import explain
from cloc_mllm.training.planning.scaling import DEVICES, GIB, estimate, state_bytes
from cloc_mllm.training.presets.config import PretrainConfig, load_config
from cloc_mllm.training.pretraining.encoder import encoder_config
from tests.builders_training import CONFIGS, TINY_ENCODER

SMALL = [item for item in TINY_ENCODER if item.startswith(("model.", "tokenizer.", "data."))]


def config(*overrides: str) -> PretrainConfig:
    loaded = load_config(CONFIGS / "pretrain_quick.yaml", [*SMALL, *overrides])
    assert isinstance(loaded, PretrainConfig)
    return loaded


def cost_of(chosen: PretrainConfig, *, fake: bool = True) -> ImageCost:
    return image_cost(chosen, lambda: ClocModel(encoder_config(chosen.model, chosen.tokenizer)), fake=fake)


@pytest.mark.parametrize("pooling", ["mean", "prompt"])
@pytest.mark.parametrize("more", [(), ("run.activation_checkpointing=true",), ("compute.patch_dropout=0.5",)])
def test_tensors_without_values_cost_what_real_ones_do(pooling: str, more: tuple[str, ...]) -> None:
    chosen = config(f"model.prompter={{pooling: {pooling}}}", *more)
    told, real = cost_of(chosen), cost_of(chosen, fake=False)
    assert [part.name for part in told.parts] == [part.name for part in real.parts]
    assert told.step_flops == real.step_flops
    assert told.forward_flops == real.forward_flops
    assert told.kept == real.kept


def test_operations_of_the_image_tower_by_hand() -> None:
    chosen = config()
    width, tokens, layers = 32, 1 + 16, 2
    patches = 2 * 16 * (3 * 8 * 8) * width
    layer = 2 * tokens * width * (4 * width + 2 * 64) + 4 * tokens * tokens * width
    projection = 2 * width * 16
    tower = cost_of(chosen).parts[0]
    assert tower.name == "image tower"
    assert tower.flops == pytest.approx(patches + layers * layer + projection, rel=0.01)


def test_backward_costs_twice_the_forward_pass_and_nothing_where_all_is_frozen() -> None:
    whole = cost_of(config())
    assert 2.8 < whole.step_flops / whole.forward_flops < 3.1
    checkpointed = cost_of(config("run.activation_checkpointing=true"))
    assert checkpointed.kept < whole.kept / 2
    assert checkpointed.recomputed > 0
    assert 3.5 < checkpointed.step_flops / checkpointed.forward_flops < 4.1
    frozen = cost_of(config("parts.vision_tower=frozen", "parts.text_tower=frozen"))
    assert frozen.forward_flops == pytest.approx(whole.forward_flops)
    assert frozen.step_flops < 1.3 * frozen.forward_flops
    assert frozen.parts[0].kept == 0, "nothing of a frozen tower is kept"


def test_patch_dropout_halves_the_tower() -> None:
    whole, half = cost_of(config()).parts[0], cost_of(config("compute.patch_dropout=0.5")).parts[0]
    assert 0.45 < half.flops / whole.flops < 0.65, "patches are embedded before they are dropped"


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [("fp32", None, (4, 4, 8)), ("bf16", 1, (2, 2, 3)), ("bf16", 2, (2, 0.5, 3)), ("bf16", 3, (0.5, 0.5, 3))],
)
def test_state_is_shared_out_as_the_stages_do(precision: str, stage: int | None, expected: tuple[float, ...]) -> None:
    assert tuple(state_bytes(1000, 1000, precision, stage, 4).values()) == tuple(1000 * x for x in expected)


COST = ImageCost((PartCost("image tower", 1e9, 0.25 * GIB),), 3e9, 0.0, 16)


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    chosen = config("run.batch_size=1024", "objective.loss_impl=tiled")
    told = estimate(chosen, COST, 10**6, 10**6, 1, 2, DEVICES["h100"])
    assert (told.plan.micro_batch, told.plan.accumulation) == (256, 2), "512 images would keep 128 GiB of 80"
    assert sum(told.memory.values()) < 72 * GIB
    stated = estimate(config("run.batch_size=1024", "run.micro_batch_size=64"), COST, 1, 1, 1, 2, DEVICES["h100"])
    assert (stated.plan.micro_batch, stated.plan.accumulation) == (64, 8)
    with pytest.raises(ClocError, match="one image at a time needs"):
        estimate(chosen, COST, 10**12, 10**12, 1, 2, DEVICES["h100"])
    with pytest.raises(ClocError, match="does not divide over 3"):
        estimate(chosen, COST, 1, 1, 1, 3, DEVICES["h100"])


def test_traffic_and_time_by_hand() -> None:
    chosen = config("run.batch_size=64", "model.prompter=null", "objective.loss_impl=tiled")
    device = replace(DEVICES["a100"], fp32_tflops=1.0, link_gbs=1.0, utilisation=0.5)
    weights = 10**6
    told = estimate(chosen, COST, weights, weights, None, 4, device)
    assert told.plan.accumulation == 1
    assert told.traffic["gradients"] == 2 * weights * 4 * 3 / 4
    assert told.traffic["embeddings"] == 3 * 64 * 16 * 4 * 3 / 4
    assert told.seconds["model"] == pytest.approx(16 * 3e9 / 0.5e12)
    assert told.seconds["network"] == pytest.approx(sum(told.traffic.values()) / 1e9)
    shared = estimate(chosen, COST, weights, weights, 2, 4, device)
    assert shared.traffic["gradients"] == told.traffic["gradients"]
    assert shared.traffic["weights"] == weights * 4 * 3 / 4
    thirds = estimate(chosen, COST, weights, weights, 3, 4, device)
    assert thirds.traffic["weights"] == 2 * weights * 4 * 3 / 4


def test_explain_prints_the_tables() -> None:
    preset = str(CONFIGS / "pretrain_quick.yaml")
    text = explain(preset, [*SMALL, "run.batch_size=1024"], 1, (8, 64), "a100")
    assert "Prompter, boxes" in text
    assert "| devices" in text
    assert "| 128 x 1" in text
    assert "1,023 others" in text
    with pytest.raises(ClocError, match="pre-training only"):
        explain(str(Path(CONFIGS, "align_quick.yaml")), ["model.encoder=x"], scale=(8,))
