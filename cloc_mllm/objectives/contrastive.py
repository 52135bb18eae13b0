"""The two contrastive losses of CLOC pre-training: image-text as in CLIP, and region-text with the text filter.

Each comes as softmax (InfoNCE) and as sigmoid loss, and each of these in two forms with the same values and gradients:

* ``plain``: every rank gathers both sides and computes the whole logit matrix of the joined batch, which costs memory
  quadratic in the global batch. It is the reference.
* ``tiled``: memory linear in the global batch; see :mod:`cloc_mllm.objectives.tiled`.

Sources: Chen et al., "Contrastive Localized Language-Image Pre-Training" (arXiv 2410.02746), section 3; for the sigmoid
Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343), equation 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cloc_mllm.objectives.distributed import gather_with_grad
from cloc_mllm.objectives.precision import full_precision, without_autocast
from cloc_mllm.objectives.tiled import Tiling, same_meaning, tiled_info_nce, tiled_sigmoid

Form = Literal["plain", "tiled"]
TILE_SIZE = 2048
"""Rows and columns of a tile: 16 MiB of fp32 logits, large enough to keep a processor busy."""


def clip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    impl: Form = "plain",
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """Symmetric InfoNCE between images and their captions, over the joined batch of all ranks.

    Args:
        image_embeds: ``(N, D)``, L2-normalised; N may differ from rank to rank and may be 0.
        text_embeds: ``(N, D)``, L2-normalised; row i describes row i of ``image_embeds``.
        logit_scale: The multiplier of the cosines, already exponentiated: a number or a tensor of one element.
        impl: ``plain``, or ``tiled`` for memory linear in N.
        tile_size: Rows and columns of a tile.

    Returns:
        A scalar, equal on every rank; 0, connected to the graph, if no rank holds a row.

    Raises:
        ValueError: The two matrices differ in shape or are not matrices, ``logit_scale`` has several elements, or
            ``impl`` or ``tile_size`` is none.
    """
    return _info_nce(image_embeds, text_embeds, logit_scale, None, impl, tile_size)


def region_text_loss(
    region_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    filter_threshold: float | None = 0.9,
    *,
    impl: Form = "plain",
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """Symmetric InfoNCE between regions and their texts, over all regions of all images of all ranks.

    Region texts repeat ("a man", "man"), which would make right answers count as negatives. So a negative pair
    (region i, text j) is left out of the denominators of both directions if the *texts* i and j have a cosine above
    the threshold. Positive pairs always stay, and no gradient flows through that test.

    Args:
        region_embeds: ``(N, D)``, L2-normalised; N may differ from rank to rank and may be 0.
        text_embeds: ``(N, D)``, L2-normalised; row i names row i of ``region_embeds``.
        logit_scale: The multiplier of the cosines, already exponentiated: a number or a tensor of one element.
        filter_threshold: The cosine above which two texts are taken to mean the same (0.9 in the paper); ``None``
            keeps every negative, and so does 1 or more, which no cosine exceeds.
        impl: ``plain``, or ``tiled`` for memory linear in N.
        tile_size: Rows and columns of a tile.

    Returns:
        A scalar, equal on every rank; 0, connected to the graph, if no rank holds a row.

    Raises:
        ValueError: As :func:`clip_loss`.
    """
    return _info_nce(region_embeds, text_embeds, logit_scale, filter_threshold, impl, tile_size)


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    impl: Form = "plain",
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """SigLIP's loss between images and captions: every pair of the joined batch is a yes-or-no question.

    Args:
        image_embeds: ``(N, D)``, L2-normalised; N may differ from rank to rank and may be 0.
        text_embeds: ``(N, D)``, L2-normalised; row i describes row i of ``image_embeds``.
        logit_scale: The multiplier of the cosines, already exponentiated: a number or a tensor of one element.
        logit_bias: Added to every logit: a number or a tensor of one element.
        impl: ``plain``, or ``tiled`` for memory linear in N.
        tile_size: Rows and columns of a tile.

    Returns:
        A scalar, equal on every rank: the sum over pairs divided by N; 0, connected to the graph, if no rank holds a
        row.

    Raises:
        ValueError: As :func:`clip_loss`, for ``logit_bias`` too.
    """
    return _sigmoid(image_embeds, text_embeds, logit_scale, logit_bias, None, impl, tile_size)


def region_text_sigmoid_loss(
    region_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    filter_threshold: float | None = 0.9,
    *,
    impl: Form = "plain",
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """SigLIP's loss between regions and their texts; ours, after :func:`region_text_loss`.

    Args:
        region_embeds: ``(N, D)``, L2-normalised; N may differ from rank to rank and may be 0.
        text_embeds: ``(N, D)``, L2-normalised; row i names row i of ``region_embeds``.
        logit_scale: The multiplier of the cosines, already exponentiated: a number or a tensor of one element.
        logit_bias: Added to every logit: a number or a tensor of one element.
        filter_threshold: Negative pairs whose texts have a larger cosine are left out; ``None`` keeps them.
        impl: ``plain``, or ``tiled`` for memory linear in N.
        tile_size: Rows and columns of a tile.

    Returns:
        A scalar as of :func:`sigmoid_loss`.

    Raises:
        ValueError: As :func:`clip_loss`, for ``logit_bias`` too.
    """
    return _sigmoid(region_embeds, text_embeds, logit_scale, logit_bias, filter_threshold, impl, tile_size)


def _info_nce(
    embeds: Tensor, texts: Tensor, logit_scale: Tensor | float, threshold: float | None, impl: Form, tile_size: int
) -> Tensor:
    """Mean of the two directions' cross-entropies over the joined batch; arguments as in :func:`region_text_loss`."""
    rows, texts, tiling = _prepared(embeds, texts, threshold, impl, tile_size)
    scale = _as_scalar(logit_scale, rows, "logit_scale")
    if impl == "tiled":
        return tiled_info_nce(rows, texts, scale, tiling)
    with without_autocast(rows):
        rows, texts = _gather_pairs(rows, texts)
        if len(rows) == 0:
            # An empty sum, not a constant: every rank's backward pass must reach every parameter.
            return rows.sum() + texts.sum() + 0.0 * scale
        logits = _without_same_meaning(scale * (rows @ texts.T), texts, tiling.filter_threshold)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _sigmoid(
    embeds: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    threshold: float | None,
    impl: Form,
    tile_size: int,
) -> Tensor:
    """Sum over pairs of ``-log sigmoid(±logit)``, over N; arguments as in :func:`region_text_sigmoid_loss`."""
    rows, texts, tiling = _prepared(embeds, texts, threshold, impl, tile_size)
    scale = _as_scalar(logit_scale, rows, "logit_scale")
    bias = _as_scalar(logit_bias, rows, "logit_bias")
    if impl == "tiled":
        return tiled_sigmoid(rows, texts, scale, bias, tiling)
    with without_autocast(rows):
        rows, texts = _gather_pairs(rows, texts)
        if len(rows) == 0:
            return rows.sum() + texts.sum() + 0.0 * (scale + bias)
        logits = _without_same_meaning(scale * (rows @ texts.T) + bias, texts, tiling.filter_threshold)
        answers = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(answers * logits).sum() / len(logits)


def _prepared(
    embeds: Tensor, texts: Tensor, threshold: float | None, impl: Form, tile_size: int
) -> tuple[Tensor, Tensor, Tiling]:
    """Check the arguments, and bring both sides to one dtype of full precision."""
    if embeds.dim() != 2 or embeds.shape != texts.shape:
        shapes = f"{tuple(embeds.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"both embeddings must be (N, D) with the same N and D, got {shapes}")
    if impl not in ("plain", "tiled"):
        raise ValueError(f"impl is {impl!r}, not one of plain, tiled")
    dtype = torch.promote_types(full_precision(embeds).dtype, full_precision(texts).dtype)
    # No cosine exceeds 1: such a threshold only costs time.
    tiling = Tiling(tile_size, threshold if threshold is not None and threshold < 1 else None)
    return embeds.to(dtype), texts.to(dtype), tiling


def _gather_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Gather both sides at once: they have the same rows on each rank, so one collective does for two."""
    left, right = gather_with_grad(torch.cat([first, second], dim=1)).chunk(2, dim=1)
    return left, right


def _as_scalar(value: Tensor | float, like: Tensor, name: str) -> Tensor:
    """Return a number as a 0-dimensional tensor of the losses' dtype and device, keeping its gradient."""
    scalar = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if scalar.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(scalar.shape)}")
    return scalar.reshape(())


def _without_same_meaning(logits: Tensor, texts: Tensor, threshold: float | None) -> Tensor:
    """Take negative pairs whose texts have a cosine above the threshold out of every sum."""
    if threshold is None:
        return logits
    same = same_meaning(texts, texts, threshold).fill_diagonal_(False)
    return logits.masked_fill(same, float("-inf"))
