"""Reads regions for the language model: one embedding, or several, for each region of an image that was encoded once.

A region is a box, a point, or a free-form shape: a box with points on it. With ``num_tokens`` of 1 + g * g, a region
is read whole and then in parts: its box cut into g by g cells, row by row, each read as a region of its own (the points
of a shape going to their cells). A cell is a box, and boxes are what the Prompter was trained on: the parts need no
weights of their own, and the first token is what it would be alone.

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
from .prompter import ClocPrompter, CoordinateEmbedding, RoiAlignPooler, sample_tokens


class RegionPrompter(ClocPrompter):
    """The CLOC Prompter, prompted by boxes and points only."""

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__(config)
        del self.text_lift  # phrases are the localiser's business

    def embed_boxes(self, boxes: torch.Tensor, points: torch.Tensor | None = None) -> torch.Tensor:
        """Two prompt tokens for each of ``(R, 4)`` boxes; a box of no size is a point and takes the points' role.

        With ``points`` ``(R, P, 2)`` there is one more token for each of them, in the points' role.
        """
        is_point = (boxes[:, :2] == boxes[:, 2:]).all(dim=-1)
        corners = boxes.new_tensor([CoordinateEmbedding.TOP_LEFT, CoordinateEmbedding.BOTTOM_RIGHT], dtype=torch.long)
        roles = torch.where(is_point[:, None], CoordinateEmbedding.POINT, corners)
        places = boxes.unflatten(-1, (2, 2))
        if points is not None:
            places = torch.cat([places, points.nan_to_num()], dim=1)
            roles = functional.pad(roles, (0, points.shape[1]), value=CoordinateEmbedding.POINT)
        return self.coordinates(places, roles)

    def forward(  # type: ignore[override]  # takes boxes where the parent takes their prompt tokens
        self,
        image_tokens: torch.Tensor,
        boxes: torch.Tensor,
        image_index: torch.Tensor,
        points: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed regions.

        Args:
            image_tokens: ``(I, N, hidden_size)`` the tower's ``last_hidden_state``.
            boxes: ``(R, 4)`` float32 xyxy, normalised, model frame; a box of no size is a point.
            image_index: ``(R,)`` the image of each box.
            points: ``(R, P, 2)`` float32, normalised, model frame: points on free-form regions; NaN where a region has
                fewer, or none.

        Returns:
            ``(R, projection_dim)`` in the space shared with CLOC's text encoder, not normalised.
        """
        padding = None
        if points is not None:
            padding = functional.pad(points.isnan().any(dim=-1), (2, 0), value=False)
        prompts = self.embed_boxes(boxes, points)
        return self.projection(super().forward(image_tokens, prompts, image_index, padding=padding))


class RegionRoiAlign(RoiAlignPooler):
    """RoI-Align in the Prompter's place: the control of the paper's table 2.

    A free-form region is the mean of the tokens at its points. Spread evenly over it, they stand for the mean over its
    mask, and what lies in its box but not on it stays out.
    """

    def forward(
        self,
        image_tokens: torch.Tensor,
        boxes: torch.Tensor,
        image_index: torch.Tensor,
        points: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :meth:`RegionPrompter.forward`."""
        pooled = self.pool(image_tokens, boxes, image_index)
        if points is not None:
            real = ~points.isnan().any(dim=-1, keepdim=True)
            at_points = sample_tokens(image_tokens, points.nan_to_num(), image_index, self.config.has_class_token)
            mean = (at_points * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
            pooled = torch.where(real.any(dim=1), mean.to(pooled.dtype), pooled)
        return self.projection(self.layer_norm(pooled))


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


def with_parts(
    boxes: torch.Tensor, points: torch.Tensor | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Regions and their parts, each region followed by its own.

    Args:
        boxes: ``(R, 4)`` xyxy.
        points: ``(R, P, 2)`` in the same frame, NaN where there is none; or ``None``.
        num_tokens: 1 + g * g: the region and g by g cells of its box.

    Returns:
        ``(R * num_tokens, 4)`` boxes and ``(R * num_tokens, P, 2)`` points, each only with the cell it lies in.
    """
    if num_tokens == 1:
        return boxes, points
    side = math.isqrt(num_tokens - 1)
    steps = torch.arange(side, device=boxes.device, dtype=boxes.dtype) / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    low, extent = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    corner = low + torch.stack([x, y], dim=-1).view(1, -1, 2) * extent
    cells = torch.cat([corner, corner + extent / side], dim=-1)
    regions = torch.cat([boxes[:, None], cells], dim=1)
    if points is None:
        return regions.flatten(0, 1), None
    # By number of the cell, not by comparing with its edges: a point on an edge belongs to one cell.
    cell = ((points - low) / extent.clamp(min=torch.finfo(boxes.dtype).tiny) * side).floor().clamp(0, side - 1)
    number = (cell[..., 1] * side + cell[..., 0])[:, None]  # NaN where there is no point, which equals no number
    wanted = torch.arange(side * side, device=boxes.device)[None, :, None]
    of_cells = torch.where((number == wanted)[..., None], points[:, None], float("nan"))
    return regions.flatten(0, 1), torch.cat([points[:, None], of_cells], dim=1).flatten(0, 1)


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
