"""The localisation term of CLOC pre-training, and the weight that both region terms get.

``L = L_CLIP + share * (L_region-text + L_grounding)``, where the share is that of images with regions.
Source: Chen et al., "Contrastive Localized Language-Image Pre-Training" (arXiv 2410.02746), section 3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cloc_mllm.models.boxes import paired_giou, xyxy_to_cxcywh
from cloc_mllm.objectives.distributed import all_reduce_sum, gather_with_grad
from cloc_mllm.objectives.precision import full_precision

GroundingKind = Literal["mse", "l1_giou"]
L1_WEIGHT = 5.0
"""Weight of the L1 term of ``l1_giou``: DETR's (Carion et al., arXiv 2005.12872)."""

GIOU_WEIGHT = 2.0
"""Weight of the GIoU term of ``l1_giou``: DETR's."""


def grounding_loss(pred_boxes: Tensor, target_boxes: Tensor, kind: GroundingKind = "mse") -> Tensor:
    """Distance of predicted boxes from true ones, averaged over the boxes of all ranks.

    * ``mse``: ``1 / (4 N) * sum of ||pred - target||²``, as published.
    * ``l1_giou``: as in DETR: ``5 * ||pred - target||_1 + 2 * (1 - GIoU)`` a box, with the L1 distance between
      (centre, size) forms. Not in the paper. Predicted corners may come unordered: GIoU is taken of the ordered box.

    Args:
        pred_boxes: ``(N, 4)`` xyxy, normalised to [0, 1] in the model frame; N may differ from rank to rank and be 0.
        target_boxes: ``(N, 4)`` in the same frame.
        kind: Which of the two.

    Returns:
        A scalar, equal on every rank; 0, connected to the graph, if no rank holds a box.

    Raises:
        ValueError: Shapes differ or are not ``(N, 4)``, or ``kind`` is unknown.
    """
    if pred_boxes.shape != target_boxes.shape or pred_boxes.dim() != 2 or pred_boxes.shape[1] != 4:
        shapes = f"{tuple(pred_boxes.shape)} and {tuple(target_boxes.shape)}"
        raise ValueError(f"predicted and target boxes must both be (N, 4), got {shapes}")
    pred, target = full_precision(pred_boxes), full_precision(target_boxes)
    if kind == "mse":
        per_box = (pred - target).square().mean(dim=1)
    elif kind == "l1_giou":
        per_box = _l1_giou(pred, target)
    else:
        raise ValueError(f"unknown grounding loss '{kind}': choose 'mse' or 'l1_giou'")
    everyone = gather_with_grad(per_box)
    return everyone.sum() / max(len(everyone), 1)


def region_share(has_regions: Tensor) -> Tensor:
    """Share of the joined batch's images that have any region: the weight λ of both region terms.

    Args:
        has_regions: ``(B,)`` bool; B may differ from rank to rank.

    Returns:
        A scalar in [0, 1], fp32, without gradient, equal on every rank; 0 for an empty batch.
    """
    flags = has_regions.bool()
    # Counted as integers: fp32 stops counting exactly at 2**24.
    mine = torch.tensor([0, flags.numel()], dtype=torch.int64, device=flags.device)
    mine[0] = flags.sum()
    with_regions, images = all_reduce_sum(mine)
    return with_regions.float() / images.clamp(min=1).float()


def _l1_giou(pred: Tensor, target: Tensor) -> Tensor:
    """Return DETR's box loss for each of ``(N, 4)`` xyxy pairs, shape ``(N,)``."""
    distance = (xyxy_to_cxcywh(pred) - xyxy_to_cxcywh(target)).abs().sum(dim=1)
    first, second = pred.chunk(2, dim=1)
    ordered = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=1)
    return L1_WEIGHT * distance + GIOU_WEIGHT * (1 - paired_giou(ordered, target))
