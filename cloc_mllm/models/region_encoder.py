"""Reads regions for the language model: one embedding for each box of an image that was encoded once.

Each class does all of its work in one ``forward`` and owns only the weights that it uses, so that adapters may wrap it
and ZeRO-3 may partition it. The parameter names are those of the encoder's parts, whose weights they start from.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .configuration_cloc import ClocPrompterConfig
from .prompter import ClocPrompter, CoordinateEmbedding, RoiAlignPooler


class RegionPrompter(ClocPrompter):
    """The CLOC Prompter, prompted by boxes and points only."""

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__(config)
        del self.text_lift  # phrases are the localiser's business

    def embed_boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Two prompt tokens for each of ``(R, 4)`` boxes; a box of no size is a point and takes the points' role."""
        is_point = (boxes[:, :2] == boxes[:, 2:]).all(dim=-1)
        corners = boxes.new_tensor([CoordinateEmbedding.TOP_LEFT, CoordinateEmbedding.BOTTOM_RIGHT], dtype=torch.long)
        roles = torch.where(is_point[:, None], CoordinateEmbedding.POINT, corners)
        return self.coordinates(boxes.unflatten(-1, (2, 2)), roles)

    def forward(  # type: ignore[override]  # takes boxes where the parent takes their prompt tokens
        self, image_tokens: torch.Tensor, boxes: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Embed regions.

        Args:
            image_tokens: ``(I, N, hidden_size)`` the tower's ``last_hidden_state``.
            boxes: ``(R, 4)`` float32 xyxy, normalised, model frame; a box of no size is a point.
            image_index: ``(R,)`` the image of each box.

        Returns:
            ``(R, projection_dim)`` in the space shared with CLOC's text encoder, not normalised.
        """
        return self.projection(super().forward(image_tokens, self.embed_boxes(boxes), image_index))


class RegionRoiAlign(RoiAlignPooler):
    """RoI-Align in the Prompter's place: the control of the paper's table 2."""

    def forward(self, image_tokens: torch.Tensor, boxes: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """As :meth:`RegionPrompter.forward`."""
        return self.projection(super().forward(image_tokens, boxes, image_index))


class RegionProjector(nn.Module):
    """From region embeddings to the language model: two linear layers with an activation, as LLaVA's for patches.

    The embedding is first scaled to unit root mean square (ours). It was trained through cosines alone, so its length
    means nothing, and differs from encoder to encoder.
    """

    def __init__(self, embed_dim: int, hidden_size: int, activation: str = "gelu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(embed_dim, hidden_size)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, region_embeds: torch.Tensor) -> torch.Tensor:
        """``(R, embed_dim)`` to ``(R, hidden_size)``."""
        unit = functional.normalize(region_embeds.float(), dim=-1) * math.sqrt(region_embeds.shape[-1])
        return self.linear_2(self.act(self.linear_1(unit.to(region_embeds.dtype))))


def build_region_reader(config: ClocPrompterConfig) -> RegionPrompter | RegionRoiAlign:
    """The region encoder that ``config.kind`` names."""
    return RegionPrompter(config) if config.kind == "prompter" else RegionRoiAlign(config)


def checked_image_index(given: torch.Tensor | None, count: int, num_images: int) -> torch.Tensor:
    """The image of each region, ``(R,)``.

    Args:
        given: ``(R,)``, or ``None`` if there is one image.
        count: How many regions there are.
        num_images: How many images there are.

    Raises:
        ValueError: If it is missing, of another length, or points to no image.
    """
    if given is None:
        if num_images != 1:
            raise ValueError(f"{count} regions on {num_images} images need a region_image_index")
        return torch.zeros(count, dtype=torch.long)
    if len(given) != count:
        raise ValueError(f"there are {count} regions, but region_image_index has {len(given)} entries")
    if not 0 <= int(given.min()) <= int(given.max()) < num_images:
        raise ValueError(f"region_image_index points to images {given.tolist()}, but there are {num_images} images")
    return given
