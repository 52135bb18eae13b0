"""Box arithmetic on tensors, and the codec that writes boxes into text and reads them back.

Every box is ``xyxy``: left, top, right, bottom. The arithmetic does not care about the unit; the codec speaks absolute
pixels of the original image on its outside and one of three text forms on its inside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

BOX_MODES = ("norm1000", "norm1", "pixel")


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """Areas of boxes.

    Args:
        boxes: ``(..., 4)`` xyxy boxes.

    Returns:
        ``(...)`` areas; a box with its corners out of order has area 0.
    """
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def xyxy_to_cxcywh(boxes: torch.Tensor) -> torch.Tensor:
    """Corners to centre and size, ``(..., 4)`` to ``(..., 4)``."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """Centre and size to corners, ``(..., 4)`` to ``(..., 4)``."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection and union areas of broadcastable boxes."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    return intersection, box_area(a) + box_area(b) - intersection


def box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every pair.

    Args:
        boxes1: ``(N, 4)`` xyxy boxes.
        boxes2: ``(M, 4)`` xyxy boxes in the same frame and unit.

    Returns:
        ``(N, M)`` IoU in [0, 1]; 0 where the union is empty.
    """
    return paired_iou(boxes1[:, None], boxes2[None])


def paired_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes taken in pairs, ``(..., 4)`` and ``(..., 4)`` to ``(...)``."""
    intersection, union = _overlap(boxes1, boxes2)
    return torch.where(union > 0, intersection / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def paired_giou(boxes1: torch.Tensor, boxes2: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Generalised IoU of boxes taken in pairs (Rezatofighi et al., arXiv 1902.09630), differentiable.

    Args:
        boxes1: ``(..., 4)`` xyxy boxes.
        boxes2: ``(..., 4)`` xyxy boxes in the same frame and unit.
        eps: Smallest area divided by, so that boxes of zero size give a finite value and gradient.

    Returns:
        ``(...)`` values in [-1, 1].
    """
    intersection, union = _overlap(boxes1, boxes2)
    hull = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])
    hull_area = hull.clamp(min=0).prod(-1)
    return intersection / union.clamp(min=eps) - (hull_area - union) / hull_area.clamp(min=eps)


@dataclass(frozen=True)
class ParsedBoxes:
    """What :meth:`BoxCodec.decode` found in a text.

    Attributes:
        boxes: Boxes in pixels of the original image, in the order of the text.
        spans: For each box, its start and end character in the text.
        unparsed: Pieces that look like a box (a bracketed group with digits) but cannot be read as one.
    """

    boxes: list[list[float]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    unparsed: list[str] = field(default_factory=list)


# A bracketed group that holds a digit, up to the next bracket of any kind or the end of the text: a group left open
# counts too, so that a cut-off answer is reported instead of overlooked. Neither pattern can match a text in two ways,
# which keeps reading linear in its length.
_GROUP = re.compile(r"[\[(][^\[\]()\d]*\d[^\[\]()]*[\])]?")
_NUMBER = r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))"
_BOX = re.compile(r"[\[(]\s*" + r"(?:\s*[,;]\s*|\s+)".join([_NUMBER] * 4) + r"\s*[\])]")


class BoxCodec:
    """Writes boxes as text for a language model and reads them back.

    The rendered form is ``[x1, y1, x2, y2]``. Modes:

    * ``norm1000``: integers 0 to 999, the share of the original image's width and height times 999, rounded. Both
      edges of the image are exact and the error is at most half a step.
    * ``norm1``: shares of width and height with three decimals and a leading zero.
    * ``pixel``: whole pixels of the original image.

    Args:
        mode: One of ``norm1000``, ``norm1`` and ``pixel``.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: str = "norm1000") -> None:
        if mode not in BOX_MODES:
            raise ValueError(f"unknown box mode {mode!r}: use one of {', '.join(BOX_MODES)}")
        self.mode = mode

    def _units(self, width: float, height: float) -> tuple[float, float]:
        """Text units per pixel along x and y."""
        if width <= 0 or height <= 0:
            raise ValueError(f"an image of {width} x {height} pixels has no box coordinates")
        if self.mode == "pixel":
            return 1.0, 1.0
        full = 999.0 if self.mode == "norm1000" else 1.0
        return full / width, full / height

    def encode(self, box: Sequence[float], width: float, height: float) -> str:
        """Render one box.

        Args:
            box: ``[x1, y1, x2, y2]`` in pixels of the original image; parts outside the image are cut off.
            width: Width of the original image in pixels.
            height: Height of the original image in pixels.

        Returns:
            The text, for example ``[12, 40, 530, 999]``.

        Raises:
            ValueError: If the box is not four finite ordered numbers.
        """
        if len(box) != 4 or not all(math.isfinite(v) for v in box):
            raise ValueError(f"a box is four finite numbers [x1, y1, x2, y2], not {list(box)}")
        if box[2] < box[0] or box[3] < box[1]:
            raise ValueError(f"box {list(box)} has its corners out of order: x1 <= x2 and y1 <= y2 are needed")
        unit_x, unit_y = self._units(width, height)
        limits = (width, height, width, height)
        values = [
            min(max(v, 0.0), limit) * unit for v, limit, unit in zip(box, limits, (unit_x, unit_y) * 2, strict=True)
        ]
        if self.mode == "norm1":
            return "[" + ", ".join(f"{v:.3f}" for v in values) + "]"
        return "[" + ", ".join(str(math.floor(v + 0.5)) for v in values) + "]"

    def decode(self, text: str, width: float, height: float) -> ParsedBoxes:
        """Read every box of a text; tolerant of spacing and of round brackets, never silent.

        A group whose numbers are out of order or lie outside the frame of the mode is reported, not repaired.

        Args:
            text: Any text.
            width: Width of the original image in pixels.
            height: Height of the original image in pixels.

        Returns:
            The boxes in pixels of the original image, their character spans, and what could not be read.
        """
        unit_x, unit_y = self._units(width, height)
        # Half a step of slack: `pixel` rounds to whole pixels, so an edge may land half a pixel outside.
        slack = {"norm1000": 0.5, "norm1": 0.0005, "pixel": 0.5}[self.mode]
        high = (width * unit_x + slack, height * unit_y + slack) * 2
        found = ParsedBoxes()
        for group in _GROUP.finditer(text):
            match = _BOX.fullmatch(group.group())
            values = [float(v) for v in match.groups()] if match else []
            ordered = bool(values) and values[0] <= values[2] and values[1] <= values[3]
            if not ordered or any(v < 0 or v > top for v, top in zip(values, high, strict=True)):
                found.unparsed.append(group.group())
                continue
            pixels = [v / unit for v, unit in zip(values, (unit_x, unit_y) * 2, strict=True)]
            limits = (width, height, width, height)
            found.boxes.append([min(v, float(limit)) for v, limit in zip(pixels, limits, strict=True)])
            found.spans.append(group.span())
        return found
