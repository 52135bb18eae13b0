"""From the language model's hidden states to logits, as its family does it.

LLaVA's own head is one linear layer without bias. Phi's has a bias; Gemma 2 and 3 cap their logits; Cohere multiplies
them and Granite divides them. All of this is told by the language model's configuration, except for the bias.
"""

from __future__ import annotations

from typing import Any

import torch


def finish_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Scale and cap logits as the language model's family does behind its linear layer.

    Args:
        logits: ``(..., vocab_size)`` what the linear layer gave.
        text_config: The language model's configuration; read are ``logit_scale`` (Cohere), ``logits_scaling``
            (Granite) and ``final_logit_softcapping`` (Gemma 2 and 3).

    Returns:
        The same tensor where nothing of this applies.
    """
    scale = getattr(text_config, "logit_scale", None)
    if scale is not None and scale != 1.0:
        logits = logits * scale
    divisor = getattr(text_config, "logits_scaling", None)
    if divisor is not None and divisor != 1.0:
        logits = logits / divisor
    cap = getattr(text_config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def is_plain_head(text_config: Any, bias: bool) -> bool:
    """Whether stock LLaVA, which knows one linear layer without bias only, gives the same logits."""
    probe = torch.tensor([[-40.0, 0.5, 40.0]])
    return not bias and torch.equal(finish_logits(probe, text_config), probe)
