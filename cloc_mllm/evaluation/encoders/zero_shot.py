"""Class names to embeddings, through the sentences they are put into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from cloc_mllm.evaluation.encoders.readouts import Encoder

_TEXTS = 4096
"""Texts embedded before they are averaged: LVIS has 96,240 of them."""


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Embed classes: the mean over the templates of each one's L2-normalised embedding, normalised again.

    Args:
        encoder: Embeds the texts.
        names: C names.
        templates: Each with ``{}`` where a name goes.

    Returns:
        ``(C, D)``, L2-normalised.
    """
    step = max(1, _TEXTS // len(templates))
    parts = []
    for start in range(0, len(names), step):
        some = names[start : start + step]
        embeds = encoder.embed_texts([template.format(name) for name in some for template in templates])
        parts.append(embeds.unflatten(0, (len(some), len(templates))).mean(dim=1))
    return functional.normalize(torch.cat(parts), dim=-1)
