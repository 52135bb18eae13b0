"""Attention of packed rows, block by block: no work, and no mask, between conversations that share a row.

Transformers makes a mask of blocks for packed rows, and its `sdpa` then computes the whole row and masks most of it
away. The implementation registered here, `sdpa_blocks`, calls the same `sdpa` once for each block. It needs no kernels
beyond torch's, is exact on every device, and is `sdpa` itself for batches that are not packed.

The bounds of the blocks travel as a keyword argument through the language model's layers to its attention. A family
whose layers do not pass such arguments on is told by name.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS = "sdpa_blocks"
"""Name of the implementation, for `set_attn_implementation`."""


def block_bounds(position_ids: torch.Tensor) -> list[list[int]]:
    """Where the blocks of each row begin, and where the last one ends.

    Args:
        position_ids: ``(B, T)`` of a packed batch, which start again at each block.
    """
    starts = torch.diff(position_ids, dim=1, prepend=position_ids[:, :1] - 2) != 1
    width = position_ids.shape[1]
    return [[*row.nonzero()[:, 0].tolist(), width] for row in starts.cpu()]


def packed_inputs(language_model: Any, position_ids: torch.Tensor) -> dict[str, Any]:
    """What a language model is called with, beside embeddings and positions, on a batch that may be packed.

    Args:
        language_model: Transformers' model, without its head.
        position_ids: ``(B, T)``.
    """
    # Transformers makes the mask of blocks only where there is no cache.
    if language_model.config._attn_implementation != BLOCKS:
        return {"use_cache": False}
    # A mask of four dimensions is taken as it is: none is made. It is never read either, see below.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device)
    return {"use_cache": False, "attention_mask": unread, "block_bounds": block_bounds(position_ids)}


def blocks_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    block_bounds: list[list[int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within blocks; without bounds, as `sdpa` does.

    Args:
        module: The attention layer.
        query: ``(B, heads, T, head_dim)``.
        key: ``(B, key_value_heads, T, head_dim)``.
        value: As the keys.
        attention_mask: Read only without bounds.
        sliding_window: Tokens that a token sees, itself included, where the layer is limited to so many.
        block_bounds: What :func:`block_bounds` returned.
        **kwargs: Passed to `sdpa`.

    Returns:
        ``(B, T, heads, head_dim)``, and no weights.

    Raises:
        ValueError: If bounds were given to the model but did not get here.
    """
    if block_bounds is None:
        if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:
            raise ValueError(f"{type(module).__name__} is not told where the blocks of packed rows are")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    rows = []
    # Split, not sliced: the gradient of all pieces together is one concatenation, of each slice a tensor of full size.
    for bounds, *states in zip(block_bounds, *(whole.split(1) for whole in (query, key, value)), strict=True):
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        blocks = []
        for length, *block in zip(lengths, *(row.split(lengths, dim=2) for row in states), strict=True):
            band = _band(length, sliding_window, query.device)
            blocks.append(sdpa_attention_forward(module, *block, band, **kwargs)[0])
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows), None


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a block that is longer than a layer's window; none where causality is all there is to it."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None]
    return ((back >= 0) & (back < window))[None, None]


AttentionInterface.register(BLOCKS, blocks_attention_forward)
AttentionMaskInterface.register(BLOCKS, sdpa_mask)
