"""Patches dropped while training: never one under a box, and the tower's own result on what is left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from cloc_mllm.models.patch_dropout import choose_patches, reading_only
from tests.builders import noise_image, tiny_cloc

SIDE = 6
corner = st.floats(0, 0.6)
boxes = st.lists(st.tuples(corner, corner, st.floats(0.02, 0.3), st.floats(0.02, 0.3)), min_size=1, max_size=3)


def touched_by(box: torch.Tensor) -> set[int]:
    """The patches that share area with a box, one by one."""
    x1, y1, x2, y2 = box.tolist()
    return {
        row * SIDE + column
        for row in range(SIDE)
        for column in range(SIDE)
        if x1 < (column + 1) / SIDE - 1e-7
        and x2 > column / SIDE + 1e-7
        and y1 < (row + 1) / SIDE - 1e-7
        and y2 > row / SIDE + 1e-7
    }


@given(boxes, st.floats(0, 0.9), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_patches_under_boxes_stay(found: list[tuple[float, ...]], dropout: float, seed: int) -> None:
    torch.manual_seed(seed)
    placed = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in found])
    index = torch.arange(len(placed)) % 2
    kept = choose_patches(placed, index, 2, SIDE, dropout, torch.device("cpu"))
    assert kept.shape == (2, max(1, round((1 - dropout) * SIDE * SIDE)))
    for image in range(2):
        mine = kept[image].tolist()
        assert mine == sorted(set(mine))
        needed = set().union(*(touched_by(box) for box in placed[index == image]), set())
        assert needed <= set(mine) or set(mine) < needed, "where there are too many, only such are kept"


def test_without_boxes_every_patch_is_as_likely() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(SIDE * SIDE)
    for _ in range(200):
        counts += torch.bincount(choose_patches(None, None, 4, SIDE, 0.5, torch.device("cpu")).flatten(), minlength=36)
    assert counts.min() > 320, "of 800 draws each is kept in about 400"
    assert counts.max() < 480


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_reads_the_patches_that_are_left(kind: str) -> None:
    torch.manual_seed(0)
    size = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 24, "patch_size": 8,
    }  # fmt: skip
    clip, siglip = CLIPVisionModel(CLIPVisionConfig(**size)), SiglipVisionModel(SiglipVisionConfig(**size))
    tower = (clip if kind == "clip" else siglip).eval()
    pixels, everything = torch.randn(2, 3, 24, 24), torch.arange(9).expand(2, 9)
    with reading_only(tower, everything):
        same = tower(pixels)
    torch.testing.assert_close(same.last_hidden_state, tower(pixels).last_hidden_state, rtol=0, atol=0)
    kept = torch.tensor([[0, 4, 5], [1, 2, 8]])
    with reading_only(tower, kept):
        fewer = tower(pixels)
        # What is in a dropped patch cannot be seen.
        pixels[0, :, :8, 8:16] += 5.0
        again = tower(pixels)
    assert fewer.last_hidden_state.shape[1] == 3 + (kind == "clip")
    torch.testing.assert_close(fewer.last_hidden_state, again.last_hidden_state, rtol=0, atol=0)
    assert tower(pixels).last_hidden_state.shape[1] == 9 + (kind == "clip"), "the hook is gone"


def test_the_encoder_drops_patches_only_while_it_is_trained() -> None:
    model, processor = tiny_cloc()
    batch = dict(processor(images=[noise_image()], text=["a star"], input_boxes=[[[2, 3, 20, 25]]]))
    batch["region_input_ids"], batch["region_attention_mask"] = batch["input_ids"], batch["attention_mask"]
    whole = model(**batch)
    model.patch_dropout = 0.5
    torch.testing.assert_close(model(**batch).region_embeds, whole.region_embeds, rtol=0, atol=0)
    model.train()
    seen: list[int] = []
    model.vision_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    torch.manual_seed(0)
    first = model(**batch)
    assert seen == [1 + 8], "half of 16 patches, and the class token"
    assert not torch.equal(first.region_embeds, whole.region_embeds)
    torch.manual_seed(0)
    assert torch.equal(model(**batch).region_embeds, first.region_embeds), "drawn from the global generator"


def test_dropping_nothing_is_the_plain_pass() -> None:
    model, processor = tiny_cloc()
    batch = dict(processor(images=[noise_image()], text=["a star"], input_boxes=[[[2, 3, 20, 25]]]))
    model.train()
    whole = model(**batch)
    model.patch_dropout = 1e-6  # rounds to no patch at all, but goes the other way
    again = model(**batch)
    torch.testing.assert_close(again.region_embeds, whole.region_embeds, rtol=0, atol=1e-6)
