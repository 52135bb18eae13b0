"""The two contrastive losses of CLOC pre-training: image-text as in CLIP, and region-text with the text filter.

This is the plain form: every rank gathers both sides and computes the whole logit matrix of the joined batch, which
costs memory quadratic in the global batch. It is the reference that any faster form has to match.
Source: Chen et al., "Contrastive Localized Language-Image Pre-Training" (arXiv 2410.02746), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cloc_mllm.objectives.distributed import gather_with_grad
from cloc_mllm.objectives.precision import full_precision, without_autocast


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE between images and their captions, over the joined batch of all ranks.

    Args:
        image_embeds: ``(N, D)``, L2-normalised; N may differ from rank to rank and may be 0.
        text_embeds: ``(N, D)``, L2-normalised; row i describes row i of ``image_embeds``.
        logit_scale: The multiplier of the cosines, already exponentiated: a number or a tensor of one element.

    Returns:
        A scalar, equal on every rank; 0, connected to the graph, if no rank holds a row.

    Raises:
        ValueError: The two matrices differ in shape or are not matrices, or ``logit_scale`` has several elements.
    """
    return _symmetric_info_nce(image_embeds, text_embeds, logit_scale, filter_threshold=None)


def region_text_loss(
    region_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, filter_threshold: float | None = 0.9
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

    Returns:
        A scalar, equal on every rank; 0, connected to the graph, if no rank holds a row.

    Raises:
        ValueError: The two matrices differ in shape or are not matrices, or ``logit_scale`` has several elements.
    """
    return _symmetric_info_nce(region_embeds, text_embeds, logit_scale, filter_threshold)


def _symmetric_info_nce(
    embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, filter_threshold: float | None
) -> Tensor:
    """Mean of the two directions' cross-entropies over the joined batch; arguments as in :func:`region_text_loss`."""
    if embeds.dim() != 2 or embeds.shape != text_embeds.shape:
        shapes = f"{tuple(embeds.shape)} and {tuple(text_embeds.shape)}"
        raise ValueError(f"both embeddings must be (N, D) with the same N and D, got {shapes}")
    with without_autocast(embeds):
        rows, texts = _gather_pairs(full_precision(embeds), full_precision(text_embeds))
        scale = _as_scale(logit_scale, rows)
        if len(rows) == 0:
            # An empty sum, not a constant: every rank's backward pass must reach every parameter.
            return rows.sum() + texts.sum() + 0.0 * scale
        logits = scale * (rows @ texts.T)
        if filter_threshold is not None and filter_threshold < 1:
            logits = logits.masked_fill(_same_meaning(texts, filter_threshold), float("-inf"))
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _gather_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Gather both sides at once: they have the same rows on each rank, so one collective does for two."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    both = gather_with_grad(torch.cat([first.to(dtype), second.to(dtype)], dim=1))
    left, right = both.chunk(2, dim=1)
    return left, right


def _as_scale(logit_scale: Tensor | float, like: Tensor) -> Tensor:
    """Return the multiplier as a 0-dimensional tensor of the losses' dtype and device, keeping its gradient."""
    scale = torch.as_tensor(logit_scale, dtype=like.dtype, device=like.device)
    if scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element, got shape {tuple(scale.shape)}")
    return scale.reshape(())


def _same_meaning(texts: Tensor, threshold: float) -> Tensor:
    """Return the ``(N, N)`` mask of negative pairs whose texts have a cosine above the threshold."""
    # Normalised again: rows that were rounded to bf16 are off unit length by more than a threshold's last digit.
    unit = F.normalize(texts.detach(), dim=1)
    return (unit @ unit.T > threshold).fill_diagonal_(False)
