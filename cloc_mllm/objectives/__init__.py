"""The losses of CLOC pre-training, global over all ranks."""

from cloc_mllm.objectives.contrastive import (
    clip_loss,
    region_text_loss,
    region_text_sigmoid_loss,
    sigmoid_loss,
)
from cloc_mllm.objectives.distributed import gather_with_grad
from cloc_mllm.objectives.grounding import grounding_loss, region_share
from cloc_mllm.objectives.tiled import share_filtered

__all__ = [
    "clip_loss",
    "gather_with_grad",
    "grounding_loss",
    "region_share",
    "region_text_loss",
    "region_text_sigmoid_loss",
    "share_filtered",
    "sigmoid_loss",
]
