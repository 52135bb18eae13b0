"""Numeric precision of the losses: at least fp32, whatever the embeddings' dtype and whatever autocast says.

A softmax over tens of thousands of bf16 logits scaled by 100 is noise, and mixed-precision training would silently
compute the logits' matrix product in bf16 even from fp32 embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or in fp64 if it is that already; gradient flows back in the original dtype."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which products on the device of ``x`` keep their operands' dtype."""
    return torch.autocast(device_type=x.device.type, enabled=False)
