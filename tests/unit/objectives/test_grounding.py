"""The grounding loss against the published formula and transformers' DETR loss; the share of images with regions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.loss.loss_for_object_detection import ImageLoss

from cloc_mllm.models.boxes import xyxy_to_cxcywh
from cloc_mllm.objectives import grounding_loss, region_share
from cloc_mllm.objectives.grounding import GIOU_WEIGHT, L1_WEIGHT, GroundingKind


def boxes(rows: int, seed: int) -> Tensor:
    """Ordered boxes in [0, 1], with sides of at least 0.01."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(rows, 2, generator=generator, dtype=torch.float64) * 0.7
    size = 0.01 + torch.rand(rows, 2, generator=generator, dtype=torch.float64) * 0.29
    return torch.cat([corner, corner + size], dim=1)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_mse_is_the_published_formula(rows: int, seed: int) -> None:
    pred, target = boxes(rows, seed), boxes(rows, seed + 1)
    expected = sum(float(torch.linalg.vector_norm(p - t)) ** 2 for p, t in zip(pred, target, strict=True)) / (4 * rows)
    assert float(grounding_loss(pred, target)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_l1_giou_is_detrs(rows: int, seed: int) -> None:
    pred, target = boxes(rows, seed), boxes(rows, seed + 1)
    oracle = ImageLoss(matcher=None, num_classes=1, eos_coef=0.1, losses=["boxes"])
    each = torch.arange(rows)
    parts = oracle.loss_boxes(
        {"pred_boxes": xyxy_to_cxcywh(pred)[None]}, [{"boxes": xyxy_to_cxcywh(target)}], [(each, each)], num_boxes=rows
    )
    expected = 5 * parts["loss_bbox"] + 2 * parts["loss_giou"]
    assert (L1_WEIGHT, GIOU_WEIGHT) == (5.0, 2.0)
    torch.testing.assert_close(grounding_loss(pred, target, kind="l1_giou"), expected)


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_gradients_are_those_of_finite_differences(kind: GroundingKind) -> None:
    pred, target = boxes(5, 0).requires_grad_(), boxes(5, 1)
    assert torch.autograd.gradcheck(lambda p: grounding_loss(p, target, kind=kind), (pred,))


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_a_perfect_prediction_costs_nothing(kind: GroundingKind) -> None:
    target = boxes(5, 2)
    assert float(grounding_loss(target, target, kind=kind)) == pytest.approx(0.0, abs=1e-12)


def test_corners_out_of_order_cost_more_and_still_teach() -> None:
    target = torch.tensor([[0.2, 0.3, 0.6, 0.7]])
    swapped = torch.tensor([[0.6, 0.3, 0.2, 0.7]], requires_grad=True)
    loss = grounding_loss(swapped, target, kind="l1_giou")
    loss.backward()
    # Ordered, the box is perfect: only the L1 term is left, of a width of -0.4 against 0.4.
    assert loss.item() == pytest.approx(5 * 0.8, rel=1e-5)
    assert swapped.grad is not None
    assert swapped.grad[0, 0] > 0 > swapped.grad[0, 2]


def test_boxes_of_no_size_give_finite_gradients() -> None:
    pred = torch.full((1, 4), 0.5, requires_grad=True)
    loss = grounding_loss(pred, torch.full((1, 4), 0.5), kind="l1_giou")
    loss.backward()
    assert pred.grad is not None
    assert loss.isfinite()
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_bf16_boxes_are_compared_in_fp32(kind: GroundingKind) -> None:
    pred, target = boxes(64, 3).bfloat16(), boxes(64, 4).float()
    loss = grounding_loss(pred, target, kind=kind)
    assert loss.dtype == torch.float32
    assert loss.equal(grounding_loss(pred.float(), target, kind=kind))


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_no_boxes_cost_nothing_and_keep_the_graph(kind: GroundingKind) -> None:
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = grounding_loss(pred, torch.zeros(0, 4), kind=kind)
    assert loss.shape == ()
    assert loss.item() == 0.0
    loss.backward()
    assert pred.grad is not None


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        grounding_loss(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="must both be"):
        grounding_loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"'huber'.*'mse' or 'l1_giou'"):
        grounding_loss(torch.zeros(3, 4), torch.zeros(3, 4), kind="huber")  # type: ignore[arg-type]


@given(flags=st.lists(st.booleans(), max_size=40))
def test_region_share_is_the_mean_of_the_flags(flags: list[bool]) -> None:
    share = region_share(torch.tensor(flags, dtype=torch.bool))
    assert share.shape == ()
    assert not share.requires_grad
    assert float(share) == pytest.approx(sum(flags) / len(flags) if flags else 0.0)
