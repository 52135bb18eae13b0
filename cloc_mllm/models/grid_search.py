"""Zero-shot localisation: embed a grid of boxes once, score them against a phrase, average the best, refine.

Ours; nothing in it is trained. Any region read-out can be searched, so CLIP's can be compared with the Prompter's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .boxes import box_iou

RegionEmbedder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GridSearch:
    """A multi-scale search over boxes.

    Attributes:
        steps: Box centres along each side of the frame.
        scales: Box sides, as shares of the frame.
        aspects: Width over height; each scale is tried with each.
        top: Boxes averaged, those with the best scores.
        refine_steps: Offsets tried along each of centre x, centre y, width and height when refining.
        refine_span: Largest offset, as a share of the frame.
        min_iou: Boxes are averaged with the best one only if they overlap it at least so much.
    """

    steps: int = 12
    scales: tuple[float, ...] = (0.25, 0.35, 0.45)
    aspects: tuple[float, ...] = (1.0,)
    top: int = 128
    refine_steps: int = 3
    refine_span: float = 0.04
    min_iou: float = 0.1

    def boxes(self, content: torch.Tensor | None = None) -> torch.Tensor:
        """The first pass's boxes: ``(K, 4)`` xyxy, normalised.

        Args:
            content: ``(4,)`` the part of the frame that the picture fills; centres are spread over it and boxes are
                clipped to it, so that no box lies in the padding. Default: all of the frame.
        """
        centres = (torch.arange(self.steps, dtype=torch.float32) + 0.5) / self.steps
        sides = torch.tensor([(s * a**0.5, s / a**0.5) for s in self.scales for a in self.aspects])
        content = torch.tensor([0.0, 0.0, 1.0, 1.0]) if content is None else content.cpu().float()
        centre = torch.cartesian_prod(centres, centres) * (content[2:] - content[:2]) + content[:2]
        centre = centre.repeat_interleave(len(sides), dim=0)
        half = sides.repeat(self.steps**2, 1) / 2
        return _clip(torch.cat([centre - half, centre + half], dim=-1), content)

    def __call__(
        self,
        embed: RegionEmbedder,
        text_embeds: torch.Tensor,
        image_index: torch.Tensor,
        content: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Search.

        Args:
            embed: Takes ``(K, 4)`` boxes, normalised, model frame, and the ``(K,)`` image of each; gives ``(K, D)``.
            text_embeds: ``(R, D)`` phrases.
            image_index: ``(R,)`` the image each phrase is looked for in.
            content: ``(B, 4)`` the part of the frame each image fills, normalised xyxy.
            scale: Multiplier of the cosine in the soft-max weights.

        Returns:
            ``(R, 4)`` float32 boxes and ``(R,)`` the best cosine of each phrase.
        """
        texts = functional.normalize(text_embeds.float(), dim=-1)
        device = texts.device
        if not len(texts):
            return torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
        # One image at a time: every box of the grid at once for a batch of images would be hundreds of prompts each.
        first = torch.zeros(len(texts), 4, device=device)
        for image, part in enumerate(content):
            wanted = (image_index == image).nonzero()[:, 0]
            if len(wanted):
                grid = self.boxes(part).to(device)
                owner = torch.full((len(grid),), image, device=device)
                regions = functional.normalize(embed(grid, owner).float(), dim=-1)
                first[wanted] = self._average(grid.expand(len(wanted), -1, -1), texts[wanted] @ regions.T, scale)[0]
        candidates = _clip(self._around(first), content.to(device)[image_index][:, None])
        count = candidates.shape[1]
        regions = embed(candidates.flatten(0, 1), image_index.repeat_interleave(count)).float()
        regions = functional.normalize(regions, dim=-1).unflatten(0, (-1, count))
        return self._average(candidates, torch.einsum("rd,rkd->rk", texts, regions), scale)

    def _average(self, boxes: torch.Tensor, scores: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft-max average of the best boxes that overlap the very best: ``(R, K, 4)``, ``(R, K)`` to ``(R, 4)``."""
        best, order = scores.topk(min(self.top, scores.shape[1]), dim=-1)
        chosen = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        overlap = torch.stack([box_iou(one[:1], one)[0] for one in chosen])
        weights = (best * scale).masked_fill(overlap < self.min_iou, float("-inf")).softmax(dim=-1)
        return (weights[..., None] * chosen).sum(1), best[:, 0]

    def _around(self, boxes: torch.Tensor) -> torch.Tensor:
        """Shifted and resized copies of ``(R, 4)`` boxes: ``(R, K, 4)``."""
        offsets = torch.linspace(-self.refine_span, self.refine_span, self.refine_steps, device=boxes.device)
        shift = torch.cartesian_prod(offsets, offsets, offsets, offsets)
        centre = (boxes[:, :2] + boxes[:, 2:])[:, None] / 2 + shift[None, :, :2]
        half = ((boxes[:, 2:] - boxes[:, :2])[:, None] + 2 * shift[None, :, 2:]).clamp(min=0.02) / 2
        return torch.cat([centre - half, centre + half], dim=-1)


def _clip(boxes: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """Cut ``(..., 4)`` boxes at the edges of ``content``, ``(4,)`` or broadcastable to the boxes."""
    low, high = content[..., :2], content[..., 2:]
    return torch.maximum(torch.minimum(boxes.unflatten(-1, (2, 2)), high[..., None, :]), low[..., None, :]).flatten(-2)
