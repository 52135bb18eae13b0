"""Texts encoded in a few batches of like length: a batch is as wide as its longest text, and most texts are short.

The number of batches is fixed and does not depend on the texts: under ZeRO-3 every process has to call the text encoder
equally often.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def encode_in_buckets(
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    buckets: int,
    multiple_of: int = 1,
    longest: int | None = None,
) -> torch.Tensor:
    """Encode texts, shortest first, in equal shares.

    Exact for an encoder in which padding on the right changes nothing, as with CLIP's causal attention.

    Args:
        encode: Takes ids and mask, each ``(t, l)``, gives ``(t, D)``.
        input_ids: ``(T, L)``, padded on the right.
        attention_mask: ``(T, L)``.
        buckets: How often `encode` is called, whatever T is; a share without texts encodes one for nothing.
        multiple_of: Lengths are rounded up to a multiple of this: fewer shapes for a compiler, and better ones.
        longest: Lengths are not rounded up beyond this, the encoder's limit.

    Returns:
        ``(T, D)`` in the order of the texts.
    """
    order = attention_mask.sum(dim=1).argsort(stable=True)
    shares = [share if len(share) else order[:1] for share in order.tensor_split(buckets)]
    # One wait for the device instead of one for each share.
    lengths = torch.stack([attention_mask[share].sum(dim=1).max() for share in shares]).tolist()
    encoded = []
    for share, length in zip(shares, lengths, strict=True):
        width = -(-int(length) // multiple_of) * multiple_of
        width = width if longest is None else min(width, longest)
        padded = functional.pad(input_ids[share], (0, max(0, width - input_ids.shape[1])))
        mask = functional.pad(attention_mask[share], (0, max(0, width - attention_mask.shape[1])))
        encoded.append(encode(padded[:, :width], mask[:, :width]))
    # Empty shares come last; what stood in for them is cut off here, but stays on the graph.
    return torch.cat(encoded)[: len(order)][order.argsort()]
