"""Patch dropout for the image tower while it is trained: fewer patches, but those that a region needs.

A tower that reads half of the patches costs half. Dropped at random, as is done for CLIP, they take small objects with
them, and a region loss then asks for what is not there. So patches under the step's boxes stay first, and the rest is
drawn at random. Every image keeps the same number, so that batches stay rectangular.
Sources: random patch dropout in Li et al., "Scaling Language-Image Pre-training via Masking" (arXiv 2212.00794); that
boxes come first is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def choose_patches(
    boxes: torch.Tensor | None,
    image_index: torch.Tensor | None,
    num_images: int,
    side: int,
    dropout: float,
    device: torch.device,
) -> torch.Tensor:
    """Draw the patches that a tower is to read.

    Args:
        boxes: ``(R, 4)`` xyxy, normalised, model frame; ``None`` if no patch comes before another.
        image_index: ``(R,)`` the image of each box.
        num_images: Number of images B.
        side: Patches on each side of the square grid.
        dropout: Share of the patches that is left out.
        device: Where to draw; the global generator of this device is used.

    Returns:
        ``(B, K)`` ascending indices into the ``side ** 2`` patches, K at least 1. Patches that a box touches are among
        them, unless an image has more than K of these: then K of these, drawn at random.
    """
    count = side * side
    order = torch.rand(num_images, count, device=device)
    if boxes is not None and image_index is not None and len(boxes):
        edges = torch.arange(side + 1, device=device, dtype=torch.float32) / side
        x1, y1, x2, y2 = boxes.to(torch.float32)[:, :, None].unbind(dim=1)
        across, down = (x1 < edges[1:]) & (x2 > edges[:-1]), (y1 < edges[1:]) & (y2 > edges[:-1])
        touched = (down[:, :, None] & across[:, None, :]).flatten(1).float()
        order = order + order.new_zeros(num_images, count).index_add(0, image_index, touched).clamp(max=1)
    kept = max(1, round((1 - dropout) * count))
    return order.topk(kept, dim=1).indices.sort(dim=1).values


@contextmanager
def reading_only(tower: nn.Module, patches: torch.Tensor) -> Iterator[None]:
    """Let a tower of transformers see some patches only, class token apart.

    Args:
        tower: A CLIP or SigLIP vision model: whatever turns images to tokens in a sub-module ``embeddings``.
        patches: ``(B, K)`` indices of the patches to keep.
    """
    embeddings: nn.Module = tower.get_submodule("embeddings")
    keep = patches
    if hasattr(embeddings, "class_embedding"):
        keep = torch.nn.functional.pad(patches + 1, (1, 0))  # the class token is number 0

    def select(module: nn.Module, args: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))

    handle = embeddings.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
