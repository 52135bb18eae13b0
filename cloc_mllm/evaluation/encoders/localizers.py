"""How an encoder is asked where something is: a phrase's embedding in, a box and a point out.

CLOC answers with its BoxHead (trained for it) or by searching a grid of boxes with its Prompter (not trained for it).
CLIP can do neither, so it is given the same search over pooled patches, and the box around the hot part of its patch
heat map; both over its last patch tokens and over its last layer's values. All satisfy :class:`Localizer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cloc_mllm.evaluation.encoders.readouts import ClocEncoder, EncodedImages, pool_patches
from cloc_mllm.models.geometry import Geometry
from cloc_mllm.models.grid_search import GridSearch

HEATMAP_THRESHOLDS = (0.5, 0.65, 0.8)
"""Shares of a heat map's range above which it counts as hot; which one is used is chosen on the validation split."""
_HEATMAP_UPSAMPLE = 4
_GRID_MEMORY = 2**26
"""Largest number of token values that a grid search gathers at once: 256 MiB in float32."""


@dataclass(frozen=True)
class Located:
    """Answers to "where?".

    Attributes:
        boxes: (P, 4) xyxy in pixels of each phrase's original image.
        points: (P, 2) x, y in the same frame.
    """

    boxes: NDArray[np.float64]
    points: NDArray[np.float64]


class Localizer(Protocol):
    """One way to find phrases in images."""

    name: str
    trained: bool
    """Whether the part that answers was trained on boxes; what was not counts as zero-shot."""

    def locate(self, images: EncodedImages, text_embeds: torch.Tensor, owner: torch.Tensor) -> Located:
        """Find phrases.

        Args:
            images: B encoded images.
            text_embeds: ``(P, D)`` L2-normalised phrase embeddings.
            owner: ``(P,)`` the image each phrase is looked for in, ascending.
        """
        ...


class BoxHeadLocalizer:
    """CLOC's BoxHead on the text-prompted Prompter."""

    name = "box_head"
    trained = True

    def __init__(self, encoder: ClocEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def locate(self, images: EncodedImages, text_embeds: torch.Tensor, owner: torch.Tensor) -> Located:
        """See :class:`Localizer`."""
        boxes = _to_pixels(images, self.encoder.model.predict_boxes(images.tokens, text_embeds, owner), owner)
        return Located(boxes, _centres(boxes))


class GridLocalizer:
    """Search of a grid of boxes, embedded by the Prompter or, for ``roi`` and ``value``, by pooling."""

    trained = False

    def __init__(self, encoder: ClocEncoder, readout: str, search: GridSearch | None = None) -> None:
        self.encoder = encoder
        self.readout = readout
        self.search = search or GridSearch()
        self.name = f"grid_{readout}"

    @torch.no_grad()
    def locate(self, images: EncodedImages, text_embeds: torch.Tensor, owner: torch.Tensor) -> Located:
        """See :class:`Localizer`."""
        found = torch.zeros(len(owner), 4)
        # Image by image, since the search does so too; in parts, since the refinement embeds dozens of boxes for each
        # phrase, each with a copy of its image's tokens.
        per_phrase = self.search.refine_steps**4 * images.tokens[0].numel()
        for image in owner.unique().tolist():
            for rows in (owner == image).nonzero()[:, 0].split(max(1, _GRID_MEMORY // per_phrase)):
                found[rows.cpu()] = self._search(images, image, text_embeds[rows]).float().cpu()
        boxes = _to_pixels(images, found, owner)
        return Located(boxes, _centres(boxes))

    def _search(self, images: EncodedImages, image: int, text_embeds: torch.Tensor) -> torch.Tensor:
        """Find phrases in one image: ``(P, 4)`` normalised boxes."""
        content = images.geometries[image].content[None]
        index = torch.zeros(len(text_embeds), dtype=torch.long, device=text_embeds.device)
        if self.readout == "prompter":
            tokens = images.tokens[image : image + 1]
            return self.encoder.model.ground_features(tokens, text_embeds, index, content, self.search)[0]
        patches = images.dense(self.readout)[image : image + 1]

        def embed(boxes: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
            return pool_patches(patches, boxes, owner)

        return self.search(embed, text_embeds, index, content, self.encoder.scale)[0]


class HeatMapLocalizer:
    """The hot part of the phrase's similarity to every patch: its peak is the point, the box goes around it.

    The map is upsampled bilinearly, scaled to [0, 1] and cut at a threshold; the box encloses the connected part that
    holds the peak. Patches whose centre lies in the padding never count.

    Args:
        threshold: Share of the map's range.
        source: ``roi``: the tower's last patch tokens; ``value``: the last layer's values (see :class:`RoiReadout`).
    """

    trained = False

    def __init__(self, threshold: float, source: str = "roi") -> None:
        self.threshold = threshold
        self.source = source
        self.name = f"heatmap_{source}_{threshold:g}"

    @torch.no_grad()
    def locate(self, images: EncodedImages, text_embeds: torch.Tensor, owner: torch.Tensor) -> Located:
        """See :class:`Localizer`."""
        patches = functional.normalize(images.dense(self.source), dim=-1)
        side = math.isqrt(patches.shape[1])
        heat = torch.einsum("pd,pnd->pn", text_embeds, patches[owner]).view(-1, 1, side, side)
        fine = functional.interpolate(heat, scale_factor=_HEATMAP_UPSAMPLE, mode="bilinear", align_corners=False)[:, 0]
        inside = self._inside(images, fine.shape[-1]).to(fine.device)[owner]
        low = fine.masked_fill(~inside, torch.inf).amin(dim=(1, 2), keepdim=True)
        high = fine.masked_fill(~inside, -torch.inf).amax(dim=(1, 2), keepdim=True)
        hot = inside & (fine >= low + self.threshold * (high - low))
        flat = fine.masked_fill(~inside, -torch.inf).flatten(1).argmax(dim=1)
        cells = fine.shape[-1]
        peak = torch.zeros_like(hot).flatten(1).scatter(1, flat[:, None], True).view_as(hot)
        boxes = _enclose(_connected(peak, hot))
        points = torch.stack([(flat % cells) + 0.5, (flat // cells) + 0.5], dim=-1) / cells
        as_boxes = torch.cat([points, points], dim=-1).cpu()
        return Located(_to_pixels(images, boxes.cpu(), owner), _to_pixels(images, as_boxes, owner)[:, :2])

    @staticmethod
    def _inside(images: EncodedImages, cells: int) -> torch.Tensor:
        """``(B, cells, cells)``: whether the centre of each cell lies in the picture."""
        at = (torch.arange(cells) + 0.5) / cells
        content = torch.stack([geometry.content for geometry in images.geometries])
        across = (at >= content[:, None, 0]) & (at <= content[:, None, 2])
        down = (at >= content[:, None, 1]) & (at <= content[:, None, 3])
        return down[:, :, None] & across[:, None, :]


def build_localizers(encoder: ClocEncoder, method: str | None = None) -> list[Localizer]:
    """Make the ways this encoder can be asked where something is.

    Args:
        encoder: The encoder.
        method: Only the ways that go with this read-out: ``prompter``, ``roi``, ``value``, or ``crop`` (none). Default
            with a Prompter its own ways and the heat maps of patch tokens, without one all that the encoder has.
    """
    has_prompter = encoder.model.prompter is not None
    if method is not None:
        sources = [method]
    elif has_prompter:
        sources = ["prompter", "roi"]
    else:
        sources = ["roi", "value"] if encoder.is_clip_tower else ["roi"]
    found: list[Localizer] = []
    for source in sources:
        if source == "prompter" and encoder.model.box_head is not None:
            found.append(BoxHeadLocalizer(encoder))
        # A grid over pooled patches is costly and no use to an encoder with a Prompter, unless it is asked for.
        if source == "prompter" or (source != "crop" and (method or not has_prompter)):
            found.append(GridLocalizer(encoder, source))
        if source in ("roi", "value"):
            found += [HeatMapLocalizer(threshold, source) for threshold in HEATMAP_THRESHOLDS]
    return found


def _to_pixels(images: EncodedImages, boxes: torch.Tensor, owner: torch.Tensor) -> NDArray[np.float64]:
    """``(P, 4)`` normalised boxes of the model frame to pixels of each one's own image."""
    result = torch.zeros(len(boxes), 4, dtype=torch.float64)
    # Together for all images that lie alike in the frame: of most data sets that are many.
    alike: dict[Geometry, list[int]] = {}
    for row, image in enumerate(owner.tolist()):
        alike.setdefault(images.geometries[image], []).append(row)
    for geometry, rows in alike.items():
        result[rows] = geometry.boxes_from_model(boxes.detach().cpu()[rows])
    return np.asarray(result.numpy(), dtype=np.float64)


def _centres(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _connected(seed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Grow ``(P, S, S)`` seeds over the neighbours (eight of them) that are in the mask, until nothing is added."""
    grown = seed & mask
    while True:
        # Shifts of booleans: a max-pooling of floats does the same at several times the cost.
        wider = grown.clone()
        wider[:, 1:] |= grown[:, :-1]
        wider[:, :-1] |= grown[:, 1:]
        down = wider.clone()
        wider[:, :, 1:] |= down[:, :, :-1]
        wider[:, :, :-1] |= down[:, :, 1:]
        wider &= mask
        if torch.equal(wider, grown):
            return grown
        grown = wider


def _enclose(mask: torch.Tensor) -> torch.Tensor:
    """``(P, S, S)`` masks, none empty, to the ``(P, 4)`` normalised boxes around them."""
    cells = mask.shape[-1]
    across, down = mask.any(dim=1).float(), mask.any(dim=2).float()
    low = torch.stack([across.argmax(dim=1), down.argmax(dim=1)], dim=-1)
    high = cells - torch.stack([across.flip(1).argmax(dim=1), down.flip(1).argmax(dim=1)], dim=-1)
    return torch.cat([low, high], dim=-1) / cells
