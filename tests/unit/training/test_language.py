"""Noise, smoothed labels and packed rows: each against what it is said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from cloc_mllm.errors import ClocError
from cloc_mllm.training.language import EmbeddingNoise, require_packable, smooth_labels, smoothed_loss
from cloc_mllm.training.options import MllmParts, OptimOptions
from cloc_mllm.training.parts import apply_parts
from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user

TALKS = [
    [user(image(1), text("what is "), region(3, 4, 20, 25), text("?")), assistant("a ring")],
    [user("how many?"), assistant("two, or three, or four")],
    [user(image(2), text("where?")), grounding_turn()],
]
ALPHA = 5.0


def fed_to_the_language_model(model: Any, batch: dict[str, Any], noise: EmbeddingNoise | None) -> torch.Tensor:
    """The embeddings that reach the language model, image and region features in their places."""
    seen = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    if noise is None:
        model(**batch)
    else:
        with noise.of(batch):
            model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("adapted", [None, "lora", "tokens"])
@pytest.mark.parametrize("packing", [False, True])
def test_noise_is_on_real_text_alone_and_as_strong_as_said(packing: bool, adapted: str | None) -> None:
    model, processor = tiny_mllm()
    if adapted is not None:
        model, _ = apply_parts(model, MllmParts.model_validate({"llm": adapted}), OptimOptions())
    model.train()
    options = {"packing": True, "pack_length": 200} if packing else {}
    batch = model_inputs(processor.encode(TALKS, return_labels=True, **options))
    clean = fed_to_the_language_model(model, batch, None)
    noise = EmbeddingNoise(model, ALPHA)
    torch.testing.assert_close(fed_to_the_language_model(model, batch, None), clean, msg="noise without being asked")
    torch.manual_seed(0)
    added = fed_to_the_language_model(model, batch, noise) - clean
    ids = batch["input_ids"]
    is_text = (ids != model.config.image_token_index) & (ids != model.config.region_token_index)
    if not packing:
        is_text &= batch["attention_mask"].bool()
    assert (added[~is_text] == 0).all(), "a feature or a padding got noise"
    # By conversation, found on its own: its text tokens' number, and noise that fills the interval it says.
    for one in TALKS:
        alone = processor.encode([one], return_labels=True)["input_ids"][0]
        bare = (alone != model.config.image_token_index) & (alone != model.config.region_token_index)
        bound = ALPHA / (int(bare.sum()) * clean.shape[-1]) ** 0.5
        row, start = next(
            (r, s)
            for r in range(len(ids))
            for s in range(ids.shape[1] - len(alone) + 1)
            if torch.equal(ids[r, s : s + len(alone)], alone)
        )
        mine = added[row, start : start + len(alone)][bare]
        assert bound * 0.9 < float(mine.abs().max()) <= bound * 1.001
        assert abs(float(mine.mean())) < bound / 4


def test_smoothed_labels_are_torchs() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, requires_grad=True), torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[2] = -100
    flat, targets = logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1)
    kept = targets != -100
    wanted = functional.cross_entropy(flat[kept], targets[kept], label_smoothing=0.1)
    torch.testing.assert_close(smoothed_loss(logits, labels, 11, 0.1), wanted)
    whole_step = functional.cross_entropy(flat[kept], targets[kept], label_smoothing=0.1, reduction="sum") / 40
    torch.testing.assert_close(smoothed_loss(logits, labels, 11, 0.1, torch.tensor(40)), whole_step)


def test_only_training_is_smoothed() -> None:
    model, processor = tiny_mllm()
    batch = model_inputs(processor.encode(TALKS, return_labels=True))
    with torch.no_grad():
        plain = model.eval()(**batch).loss
        smooth_labels(model, 0.1)
        torch.testing.assert_close(model(**batch).loss, plain)
        output = model.train()(**batch, num_items_in_batch=50)
    wanted = smoothed_loss(output.logits, batch["labels"], output.logits.shape[-1], 0.1, 50)
    torch.testing.assert_close(output.loss, wanted)
    assert abs(float(wanted) * 50 / int((batch["labels"][:, 1:] != -100).sum()) - float(plain)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_language_models_that_can_be_packed_pass(family: str) -> None:
    model, _ = tiny_mllm(family)
    model.train()
    require_packable(model)
    assert model.training
    assert model.model.language_model.training


def test_a_language_model_that_looks_over_the_border_is_refused() -> None:
    model, _ = tiny_mllm()
    llm = model.model.language_model
    forward = llm.forward
    llm.forward = lambda **inputs: forward(**{**inputs, "position_ids": None})
    with pytest.raises(ClocError, match="lets packed conversations see each other"):
        require_packable(model)
