"""The contrastive losses against transformers' CLIP loss, loops that follow the definition, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from cloc_mllm.objectives import clip_loss, region_text_loss, region_text_sigmoid_loss, sigmoid_loss

Loss = Callable[[Tensor, Tensor, Tensor | float], Tensor]
BIAS = -1.5
ALL_LOSSES: list[Loss] = [
    partial(loss, impl=impl)
    for impl in ("plain", "tiled")
    for loss in (
        clip_loss,
        region_text_loss,
        partial(sigmoid_loss, logit_bias=BIAS),
        partial(region_text_sigmoid_loss, logit_bias=BIAS),
    )
]


def unit_rows(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1)


def texts_with_repeats(rows: int, width: int, seed: int) -> Tensor:
    """Rows of which some are equal and some nearly so, as region texts are."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, max(1, rows // 2), (rows,), generator=generator)
    noise = 0.15 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    noise[::2] = 0
    return F.normalize(unit_rows(rows, width, seed + 1)[pick] + noise, dim=1)


def loss_by_loops(regions: Tensor, texts: Tensor, scale: float, threshold: float | None) -> float:
    """The definition, one term at a time."""
    n, total = len(regions), 0.0
    for i in range(n):
        positive = scale * float(regions[i] @ texts[i])
        kept = [j for j in range(n) if j == i or threshold is None or float(texts[i] @ texts[j]) <= threshold]
        by_region = sum(math.exp(scale * float(regions[i] @ texts[j])) for j in kept)
        by_text = sum(math.exp(scale * float(regions[j] @ texts[i])) for j in kept)
        total += (math.log(by_region) - positive) + (math.log(by_text) - positive)
    return total / (2 * n)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 8), seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_clip_loss_is_that_of_transformers(rows: int, width: int, seed: int, scale: float) -> None:
    images, texts = unit_rows(rows, width, seed), unit_rows(rows, width, seed + 1)
    expected = image_text_contrastive_loss(scale * texts @ images.T)
    torch.testing.assert_close(clip_loss(images, texts, torch.tensor([scale], dtype=torch.float64)), expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 10),
    width=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 50),
    threshold=st.sampled_from([None, -0.5, 0.0, 0.5, 0.9]),
)
def test_region_text_loss_follows_the_definition(
    rows: int, width: int, seed: int, scale: float, threshold: float | None
) -> None:
    regions, texts = unit_rows(rows, width, seed), texts_with_repeats(rows, width, seed)
    loss = region_text_loss(regions, texts, scale, filter_threshold=threshold)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(loss_by_loops(regions, texts, scale, threshold), rel=1e-9, abs=1e-12)


def test_the_default_threshold_is_the_papers() -> None:
    regions, texts = unit_rows(8, 4, 0), texts_with_repeats(8, 4, 0)
    assert region_text_loss(regions, texts, 10.0).equal(region_text_loss(regions, texts, 10.0, filter_threshold=0.9))
    assert not region_text_loss(regions, texts, 10.0).isclose(clip_loss(regions, texts, 10.0))


@pytest.mark.parametrize("threshold", [None, 1.0, 1.5])
def test_the_filter_can_be_off(threshold: float | None) -> None:
    regions, texts = unit_rows(8, 4, 0), texts_with_repeats(8, 4, 0)
    assert region_text_loss(regions, texts, 10.0, filter_threshold=threshold).equal(clip_loss(regions, texts, 10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_texts_never_count_as_negatives(dtype: torch.dtype) -> None:
    # With one text for all regions every negative is dropped and each positive stands alone: the loss is exactly 0.
    texts = unit_rows(1, 16, 3).expand(6, -1).to(dtype)
    assert float(region_text_loss(unit_rows(6, 16, 4).to(dtype), texts, 100.0)) == 0.0


def test_the_filter_looks_at_the_texts_not_at_the_regions() -> None:
    texts = torch.eye(3, dtype=torch.float64)
    regions = unit_rows(1, 3, 5).expand(3, -1)
    assert region_text_loss(regions, texts, 10.0).equal(clip_loss(regions, texts, 10.0))


def test_gradients_are_those_of_finite_differences() -> None:
    regions, texts = unit_rows(6, 5, 1).requires_grad_(), unit_rows(6, 5, 2).requires_grad_()
    repeated = texts_with_repeats(6, 5, 2).requires_grad_()
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clip_loss, (regions, texts, scale))
    # The threshold's side that each pair is on does not change within a finite difference.
    assert torch.autograd.gradcheck(region_text_loss, (regions, repeated, scale))


def test_dropped_pairs_pull_and_push_nothing() -> None:
    """Texts 0 and 1 are equal: region 0's gradient knows of text 0 and 2 only, as if text 1 were not there."""
    text = unit_rows(3, 8, 6)
    text[1] = text[0]
    region = unit_rows(3, 8, 7).requires_grad_()
    region_text_loss(region, text, 5.0).backward()
    assert region.grad is not None
    basis = text[[0, 2]]
    coefficients = torch.linalg.lstsq(basis.T, region.grad[0]).solution
    torch.testing.assert_close(coefficients @ basis, region.grad[0])


def test_no_gradient_flows_through_the_filter() -> None:
    regions, texts = unit_rows(8, 4, 0), texts_with_repeats(8, 4, 0).requires_grad_()
    region_text_loss(regions, texts, 10.0).backward()
    keep = texts.detach() @ texts.detach().T <= 0.9
    keep.fill_diagonal_(True)
    constant = texts.detach().clone().requires_grad_()
    logits = torch.where(keep, 10.0 * regions @ constant.T, -torch.inf)
    image_text_contrastive_loss(logits).backward()
    torch.testing.assert_close(texts.grad, constant.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computed_in_fp32_whatever_the_dtype(dtype: torch.dtype) -> None:
    regions, texts = unit_rows(32, 16, 1).to(dtype), unit_rows(32, 16, 2).to(dtype)
    leaf = regions.clone().requires_grad_()
    loss = region_text_loss(leaf, texts, torch.tensor([100.0], dtype=dtype))
    assert loss.dtype == torch.float32
    assert loss.equal(region_text_loss(regions.float(), texts.float(), 100.0))
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype


def test_autocast_does_not_lower_the_precision() -> None:
    regions = unit_rows(32, 16, 1, torch.float32).requires_grad_()
    texts = unit_rows(32, 16, 2, torch.float32)
    plain = region_text_loss(regions, texts, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (regions @ texts.T).dtype == torch.bfloat16
        inside = region_text_loss(regions, texts, 100.0)
    assert inside.equal(plain)
    gradients = [torch.autograd.grad(loss, regions)[0] for loss in (plain, inside)]
    assert gradients[0].equal(gradients[1])


def test_fp64_stays_fp64() -> None:
    assert region_text_loss(unit_rows(3, 4, 0), unit_rows(3, 4, 1), 10.0).dtype == torch.float64


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3.0]])])
def test_the_scale_may_be_a_number_or_any_tensor_of_one_element(scale: float | Tensor) -> None:
    images, texts = unit_rows(4, 4, 0), unit_rows(4, 4, 1)
    assert clip_loss(images, texts, scale).equal(clip_loss(images, texts, torch.tensor(3.0, dtype=torch.float64)))
    assert clip_loss(images, texts, scale).shape == ()


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_no_rows_cost_nothing_and_keep_the_graph(loss: Loss) -> None:
    left, right = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    scale = torch.tensor([3.0], requires_grad=True)
    value = loss(left, right, scale)
    assert value.shape == ()
    assert value.item() == 0.0
    value.backward()
    assert left.grad is not None
    assert right.grad is not None
    assert scale.grad is not None
    assert float(scale.grad) == 0.0


def test_large_scales_stay_finite() -> None:
    images, texts = unit_rows(16, 4, 0).float().requires_grad_(), unit_rows(16, 4, 1).float()
    loss = clip_loss(images, texts, 1e4)
    loss.backward()
    assert images.grad is not None
    assert loss.isfinite()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("left", "right", "scale"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), 1.0),
        (torch.ones(3, 4), torch.ones(3, 5), 1.0),
        (torch.ones(3), torch.ones(3), 1.0),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(2)),
    ],
)
@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_wrong_shapes_are_refused(loss: Loss, left: Tensor, right: Tensor, scale: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"got (shape )?\("):
        loss(left, right, scale)
