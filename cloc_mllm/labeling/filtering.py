"""Which of a detector's finds become labels, and why the others do not.

The rules apply in the order of `REASONS`, each to what those before it left over, and each find that goes is counted
under the one rule that took it: kept + all counts = found. Finds are first brought into one order (score, then box,
then text), so neither the order they come in nor ties change the outcome.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.stages import Detection
from cloc_mllm.models.boxes import box_iou

REASONS = ("score", "side", "area_small", "area_large", "whole_image", "same_box", "overlap", "cap")
"""What a find can be dropped for, in the order in which the rules apply."""

NMS_SCOPES = ("all", "text", "none")
WHOLE_IMAGE_SHARE = 0.98
"""A box that is at least this share of the picture's width and of its height is of the whole picture."""


@dataclass(frozen=True)
class FilterOptions:
    """What has to be true of a find for it to be kept.

    Attributes:
        score: Confidence has to be above this (the paper: 0.1).
        min_side: Shortest side a box may have, in pixels of the picture.
        min_area: Smallest area a box may have, as a share of the picture's.
        max_area: Largest area a box may have, as a share of the picture's.
        drop_whole_image: Whether boxes of the whole picture go (`WHOLE_IMAGE_SHARE` of both sides): the caption says
            those already.
        one_phrase_per_box: Whether of several phrases on the very same box only the most confident stays (the paper).
        nms: Whom a more confident box suppresses where they overlap: `all` boxes, those of the same `text`, or `none`.
        nms_iou: IoU above which it does.
        max_per_image: How many are kept at most, the most confident; None for all.

    Raises:
        ClocError: A value is out of its range.
    """

    score: float = 0.1
    min_side: float = 1.0
    min_area: float = 0.0
    max_area: float = 1.0
    drop_whole_image: bool = False
    one_phrase_per_box: bool = True
    nms: str = "all"
    nms_iou: float = 0.7
    max_per_image: int | None = None

    def __post_init__(self) -> None:
        for name in ("score", "min_area", "max_area", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClocError(f"filter.{name} is {getattr(self, name)}", remedy="It has to be between 0 and 1.")
        if not (math.isfinite(self.min_side) and self.min_side >= 0):
            raise ClocError(f"filter.min_side is {self.min_side}", remedy="It is a number of pixels, 0 or more.")
        if self.min_area > self.max_area:
            raise ClocError(f"filter.min_area ({self.min_area}) is above filter.max_area ({self.max_area})")
        if self.nms not in NMS_SCOPES:
            raise ClocError(f"filter.nms is '{self.nms}'", remedy=f"Use one of {', '.join(NMS_SCOPES)}.")
        if self.max_per_image is not None and self.max_per_image < 1:
            raise ClocError(f"filter.max_per_image is {self.max_per_image}", remedy="Use 1 or more, or null for all.")


def filter_detections(
    detections: Sequence[Detection], size: tuple[int, int], options: FilterOptions
) -> tuple[list[Detection], Counter[str]]:
    """Keep what may become a label of a picture.

    Args:
        detections: What was found in the picture, in any order.
        size: The picture's width and height in pixels.
        options: What is asked of a find.

    Returns:
        What is kept, the most confident first (ties by box, then by text), and for each of `REASONS` that took
        something how many: together as many as came in.

    Raises:
        ClocError: A score or box is not finite, or a box lies outside the picture: a broken detector.
    """
    ordered = sorted(detections, key=lambda found: (-found.score, found.box, found.text))
    dropped: Counter[str] = Counter()
    candidates = []
    for found in ordered:
        _check(found, size)
        reason = _fault(found, size, options)
        if reason is None:
            candidates.append(found)
        else:
            dropped[reason] += 1
    if options.one_phrase_per_box:
        best = {found.box: found for found in reversed(candidates)}
        distinct = [found for found in candidates if best[found.box] is found]
        dropped["same_box"] += len(candidates) - len(distinct)
        candidates = distinct
    survivors = [candidates[k] for k in _unsuppressed(candidates, options)]
    dropped["overlap"] += len(candidates) - len(survivors)
    kept = survivors[: options.max_per_image]
    dropped["cap"] += len(survivors) - len(kept)
    return kept, +dropped


def _check(found: Detection, size: tuple[int, int]) -> None:
    """Refuse what no working detector says."""
    x1, y1, x2, y2 = found.box
    if not all(math.isfinite(value) for value in (*found.box, found.score)):
        remedy = "The model's numbers overflow: use another dtype, or check its weights."
        raise ClocError(f"'{found.text}' was found with a score or box that is not finite", remedy=remedy)
    if not (0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]):
        problem = f"'{found.text}' was found at {list(found.box)}, outside the picture of {size[0]} x {size[1]} pixels"
        raise ClocError(problem, remedy="Boxes are [x1, y1, x2, y2] in pixels of the original picture.")


def _fault(found: Detection, size: tuple[int, int], options: FilterOptions) -> str | None:
    """The first rule that a find breaks on its own."""
    width, height = found.box[2] - found.box[0], found.box[3] - found.box[1]
    share = width * height / (size[0] * size[1])
    if found.score <= options.score:
        return "score"
    if min(width, height) < options.min_side:
        return "side"
    if share < options.min_area:
        return "area_small"
    if share > options.max_area:
        return "area_large"
    whole = width >= WHOLE_IMAGE_SHARE * size[0] and height >= WHOLE_IMAGE_SHARE * size[1]
    return "whole_image" if whole and options.drop_whole_image else None


def _unsuppressed(ordered: Sequence[Detection], options: FilterOptions) -> Iterator[int]:
    """Places of those that no more confident one suppresses which is itself left (greedy NMS)."""
    if options.nms == "none" or not ordered:
        yield from range(len(ordered))
        return
    boxes = torch.tensor([found.box for found in ordered], dtype=torch.float64)
    overlaps = box_iou(boxes, boxes) > options.nms_iou
    if options.nms == "text":
        number = {text: k for k, text in enumerate(dict.fromkeys(found.text for found in ordered))}
        texts = torch.tensor([number[found.text] for found in ordered])
        overlaps &= texts[:, None] == texts[None]
    suppressed = torch.zeros(len(ordered), dtype=torch.bool)
    for place in range(len(ordered)):
        if not suppressed[place]:
            yield place
            suppressed |= overlaps[place]
