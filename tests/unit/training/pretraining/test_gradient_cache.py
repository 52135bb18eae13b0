"""A step in micro-batches, through the gradient cache, against the same step in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cloc_mllm.data.collate import RegionTextCollator
from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.models.modeling_cloc import ClocModel, ClocOutput
from cloc_mllm.training.presets.options import PretrainObjective
from cloc_mllm.training.pretraining.gradient_cache import Inputs, plan_replays, restore_random_state
from cloc_mllm.training.pretraining.pretrain import MODEL_INPUTS, PretrainTrainer
from tests.builders import tiny_cloc
from tests.builders_training import write_regions


@pytest.fixture
def samples(tmp_path: Path) -> list[dict[str, Any]]:
    dataset = RegionTextDataset(write_regions(tmp_path, 8, seed=3), max_regions=3)
    return [dataset[k] for k in range(8)]


def trainer(**objective: Any) -> Any:
    """The objective without the trainer around it."""
    bare: Any = PretrainTrainer.__new__(PretrainTrainer)
    bare.objective, bare.max_regions = PretrainObjective(**objective), 3
    return bare


def run(model: nn.Module, inputs: Inputs) -> ClocOutput:
    found: ClocOutput = model(**{key: inputs[key] for key in MODEL_INPUTS if key in inputs})
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 3, 2), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("prompter", {"filter_threshold": 0.8, "grounding_loss": "l1_giou"}),
        ("prompter", {"contrast": "sigmoid", "loss_impl": "tiled", "tile_size": 3}),
        ("roi_align", {}),
        (None, {}),
        (None, {"extra_captions": True}),
    ],
    ids=["cloc", "sigmoid", "roi_align", "clip", "clip_captions"],
)
def test_micro_batches_give_the_gradients_of_one_batch(
    kind: str | None, objective: dict[str, Any], sizes: tuple[int, ...], samples: list[dict[str, Any]]
) -> None:
    model, processor = tiny_cloc(kind=kind)
    if "contrast" in objective:
        model.add_logit_biases(-2.0)
    regions = kind is not None or bool(objective)
    collator, bare = RegionTextCollator(processor, regions), trainer(**objective)
    whole = collator(samples)
    loss, scalars = bare.objective_of(run(model.train(), whole), whole)
    loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    parts = [collator(samples[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    replays = plan_replays(lambda inputs: run(model, inputs), parts, bare.objective_of)
    for part, replay in zip(parts, replays, strict=True):
        surrogate = replay.surrogate(run(model, part), len(parts))
        torch.testing.assert_close(surrogate, loss)
        (surrogate / len(parts)).backward()
        assert replay.scalars.keys() == scalars.keys()
    found = gradients(model)
    assert found.keys() == expected.keys()
    # The keys' biases have no gradient but rounding: a softmax does not see them.
    floor = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error, size = (found[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-5 * size + floor, name


def test_the_contrast_of_halves_is_another_loss(samples: list[dict[str, Any]]) -> None:
    """What the cache is for: without it, each micro-batch has fewer negatives."""
    model, processor = tiny_cloc()
    collator, bare = RegionTextCollator(processor), trainer()
    with torch.no_grad():
        whole, *halves = (
            bare.objective_of(run(model, batch), batch)[0]
            for batch in (collator(samples), collator(samples[:4]), collator(samples[4:]))
        )
    assert float(whole) - float(sum(halves) / 2) > 0.1


def test_the_second_pass_drops_what_the_first_one_dropped(samples: list[dict[str, Any]]) -> None:
    plain, processor = tiny_cloc()
    plain.config.vision_config.attention_dropout = plain.config.text_config.attention_dropout = 0.3
    model = ClocModel(plain.config).train()
    collator = RegionTextCollator(processor)
    parts = [collator(samples[:4]), collator(samples[4:])]
    seen: list[ClocOutput] = []

    def embed(inputs: Inputs) -> ClocOutput:
        seen.append(run(model, inputs))
        return seen[-1]

    torch.manual_seed(0)
    replays = plan_replays(embed, parts, trainer().objective_of)
    after = torch.get_rng_state()
    for part, replay, first in zip(parts, replays, list(seen), strict=True):
        assert not torch.equal(run(model, part).image_embeds, first.image_embeds), "the masks are random"
        with torch.random.fork_rng():
            restore_random_state(replay.random_state)
            torch.testing.assert_close(run(model, part).image_embeds, first.image_embeds)
    assert not torch.equal(replays[0].random_state[0], replays[1].random_state[0])
    assert not torch.equal(after, replays[0].random_state[0])
