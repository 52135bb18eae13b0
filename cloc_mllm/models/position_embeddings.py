"""Learned position embeddings of a tower, taken to a frame with another number of patches."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

POSITION_KEY = "embeddings.position_embedding.weight"
"""Where transformers' CLIP and SigLIP towers keep them."""


def fit_positions(weights: Mapping[str, torch.Tensor], tower: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for ``tower`` with their position embeddings interpolated, if it has another number of patches.

    Args:
        weights: Of a tower that differs in nothing but the side of its frame.
        tower: What they are for; of parts without patches nothing is changed.

    Returns:
        The weights, the others as they were.
    """
    fitted, given = dict(weights), weights.get(POSITION_KEY)
    if given is None or not hasattr(tower.get_submodule("embeddings"), "patch_embedding"):
        return fitted
    wanted = tower.get_parameter(POSITION_KEY).shape[0]
    if wanted != len(given):
        fitted[POSITION_KEY] = resize_positions(given, wanted)
    return fitted


def resize_positions(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Interpolate position embeddings of a square grid bicubically, as transformers' towers do at run time.

    Args:
        weight: ``(N, D)``: a class token's in front, if N is a square plus one, then those of a square grid.
        count: Number of embeddings wanted, with the class token's.

    Returns:
        ``(count, D)``; the class token's is kept as it is.

    Raises:
        ValueError: If either number is that of no square grid.
    """
    leading = len(weight) - math.isqrt(len(weight)) ** 2
    old, new = math.isqrt(len(weight)), math.isqrt(max(count - leading, 0))
    if leading not in (0, 1) or new * new + leading != count:
        raise ValueError(f"{len(weight)} position embeddings cannot be interpolated to {count}: not square grids")
    grid = weight[leading:].float().T.reshape(1, -1, old, old)
    resized = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([weight[:leading], resized.flatten(2)[0].T.to(weight.dtype)])
