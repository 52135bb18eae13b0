"""The tiled form against the plain one, value and every gradient; the sigmoid loss against transformers' SigLIP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

from cloc_mllm.objectives import clip_loss, region_text_loss, region_text_sigmoid_loss, share_filtered, sigmoid_loss
from tests.unit.objectives.test_contrastive import texts_with_repeats, unit_rows

THRESHOLDS = st.sampled_from([None, -0.5, 0.5, 0.9])


def outcome(softmax: bool, rows: int, seed: int, scale: float, threshold: float | None, **form: Any) -> list[Tensor]:
    """The value, and the gradients of rows, texts, multiplier and bias."""
    leaves = [unit_rows(rows, 5, seed), texts_with_repeats(rows, 5, seed)]
    leaves += [torch.tensor(value, dtype=torch.float64) for value in (scale, -0.3 * scale)]
    regions, texts, multiplier, bias = (leaf.requires_grad_() for leaf in leaves)
    if softmax:
        loss = region_text_loss(regions, texts, multiplier, threshold, **form)
    else:
        loss = region_text_sigmoid_loss(regions, texts, multiplier, bias, threshold, **form)
    # Not 1: the incoming gradient has to be made use of.
    return [loss, *torch.autograd.grad(3 * loss, [regions, texts, multiplier, *([] if softmax else [bias])])]


@settings(max_examples=60, deadline=None)
@given(
    softmax=st.booleans(),
    rows=st.integers(1, 11),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 100),
    threshold=THRESHOLDS,
    tile_size=st.integers(1, 12),
)
def test_tiles_change_nothing(
    softmax: bool, rows: int, seed: int, scale: float, threshold: float | None, tile_size: int
) -> None:
    plain = outcome(softmax, rows, seed, scale, threshold)
    tiled = outcome(softmax, rows, seed, scale, threshold, impl="tiled", tile_size=tile_size)
    for expected, got in zip(plain, tiled, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile_size", [1, 4, 64])
def test_image_losses_have_no_filter(tile_size: int) -> None:
    images, texts = unit_rows(9, 4, 0), texts_with_repeats(9, 4, 0)
    form: dict[str, Any] = {"impl": "tiled", "tile_size": tile_size}
    torch.testing.assert_close(clip_loss(images, texts, 9.0, **form), clip_loss(images, texts, 9.0))
    assert not clip_loss(images, texts, 9.0, **form).isclose(region_text_loss(images, texts, 9.0, **form))
    torch.testing.assert_close(sigmoid_loss(images, texts, 9.0, -1.0, **form), sigmoid_loss(images, texts, 9.0, -1.0))


def test_the_sigmoid_loss_is_that_of_transformers() -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = SiglipConfig(
        vision_config={**size, "image_size": 8, "patch_size": 4}, text_config={**size, "vocab_size": 30}
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_bias.fill_(-2.0)
        pixels, ids = torch.randn(5, 3, 8, 8), torch.randint(0, 30, (5, 6))
        found = model(input_ids=ids, pixel_values=pixels, return_loss=True)
        scale = model.logit_scale.exp()
        for impl in ("plain", "tiled"):
            got = sigmoid_loss(found.image_embeds, found.text_embeds, scale, model.logit_bias, impl=impl, tile_size=2)
            torch.testing.assert_close(got, found.loss)


def test_gradients_of_tiles_are_those_of_finite_differences() -> None:
    regions, texts = unit_rows(5, 4, 1).requires_grad_(), texts_with_repeats(5, 4, 2).requires_grad_()
    scale, bias = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (7.0, -2.0))
    form: dict[str, Any] = {"impl": "tiled", "tile_size": 2}
    assert torch.autograd.gradcheck(lambda *x: region_text_loss(*x, **form), (regions, texts, scale))
    assert torch.autograd.gradcheck(lambda *x: region_text_sigmoid_loss(*x, **form), (regions, texts, scale, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_are_computed_in_fp32_under_autocast_too(dtype: torch.dtype) -> None:
    texts = unit_rows(32, 16, 2).to(dtype)
    leaves = [unit_rows(32, 16, 1).to(dtype).requires_grad_() for _ in range(2)]
    plain = region_text_loss(leaves[0], texts, 100.0)
    plain.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiled = region_text_loss(leaves[1], texts, 100.0, impl="tiled", tile_size=8)
        tiled.backward()
    assert tiled.dtype == torch.float32
    torch.testing.assert_close(tiled, plain)
    assert leaves[1].grad is not None
    assert leaves[1].grad.dtype == dtype
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_a_row_that_nothing_else_may_be_compared_with_costs_nothing() -> None:
    texts = unit_rows(1, 8, 3).expand(7, -1)
    assert abs(float(region_text_loss(unit_rows(7, 8, 4), texts, 100.0, impl="tiled", tile_size=3))) < 1e-12


def test_wrong_forms_are_refused() -> None:
    rows = unit_rows(3, 4, 0)
    with pytest.raises(ValueError, match="impl is 'fast', not one of plain, tiled"):
        clip_loss(rows, rows, 1.0, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile_size must be at least 1, got 0"):
        clip_loss(rows, rows, 1.0, impl="tiled", tile_size=0)
    with pytest.raises(ValueError, match="logit_bias must have one element"):
        sigmoid_loss(rows, rows, 1.0, torch.zeros(2))


@pytest.mark.parametrize("tile_size", [1, 3, 100])
def test_the_share_filtered_is_counted_over_negative_pairs(tile_size: int) -> None:
    texts = torch.eye(4)[[0, 0, 0, 1, 2]]
    # Of 20 ordered negative pairs, the 6 among the first three.
    assert float(share_filtered(texts, 0.9, tile_size)) == pytest.approx(0.3)
    assert float(share_filtered(texts[:1], 0.9, tile_size)) == 0.0
    assert float(share_filtered(texts[:0], 0.9, tile_size)) == 0.0
