"""Where boxes come from that an encoder gives names to: the truth, a grid, a file, or a labelling detector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.readouts import EncodedImages
from cloc_mllm.evaluation.encoders.region_data import RegionSplit
from cloc_mllm.labeling.stages import DETECTORS, build_stage
from cloc_mllm.models.grid_search import GridSearch

KINDS = ("ground-truth", "grid", "file:PATH", "detector:SPEC")
GRID = GridSearch(steps=10, scales=(0.1, 0.2, 0.35, 0.55, 0.8), aspects=(0.5, 1.0, 2.0))
"""1,500 boxes an image, from a tenth of the frame to nearly all of it."""
_MIN_SIDE = 1.0


@dataclass(frozen=True)
class Proposals:
    """Boxes of one image that may hold something.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the original.
        objectness: (N,) how sure their source is that they do, 0 to 1; 1 where it does not say.
    """

    boxes: NDArray[np.float64]
    objectness: NDArray[np.float64]


class ProposalSource(Protocol):
    """One way to come by boxes.

    Attributes:
        distinct: Whether no two of its boxes are of the same object, so that nothing has to be suppressed.
    """

    distinct: bool

    @property
    def described(self) -> str:
        """What it is, in words, with what it left out."""
        ...

    def __call__(self, images: EncodedImages, numbers: Sequence[int]) -> list[Proposals]:
        """Propose boxes.

        Args:
            images: B encoded images.
            numbers: Which images of the split they are.
        """
        ...


class GroundTruthProposals:
    """The true boxes: what is measured then is naming alone."""

    described = "the true boxes"
    distinct = True

    def __init__(self, split: RegionSplit) -> None:
        self._boxes: list[list[Sequence[float]]] = [[] for _ in split.ids]
        for region in split.regions:
            self._boxes[region.image].append(region.box)

    def __call__(self, images: EncodedImages, numbers: Sequence[int]) -> list[Proposals]:
        """See :class:`ProposalSource`."""
        return [_of(self._boxes[number]) for number in numbers]


class GridProposals:
    """Boxes of many sizes and shapes all over the picture."""

    distinct = False

    def __init__(self, grid: GridSearch = GRID) -> None:
        self.grid = grid
        self.described = (
            f"a grid of {grid.steps} x {grid.steps} places, sides {', '.join(f'{s:g}' for s in grid.scales)} of the "
            f"frame, width to height {', '.join(f'{a:g}' for a in grid.aspects)}"
        )

    def __call__(self, images: EncodedImages, numbers: Sequence[int]) -> list[Proposals]:
        """See :class:`ProposalSource`."""
        found = []
        for geometry in images.geometries:
            boxes = geometry.boxes_from_model(self.grid.boxes(geometry.content)).numpy()
            sides = boxes[:, 2:] - boxes[:, :2]
            found.append(_of(np.unique(boxes[(sides >= _MIN_SIDE).all(axis=1)], axis=0)))
        return found


class FileProposals:
    """Boxes that any program wrote as COCO's results: a JSON list of ``image_id``, ``bbox`` (xywh, pixels), ``score``.

    Args:
        path: The file. ``score`` may be missing; a ``category_id`` is ignored.
        split: Whose images the boxes are for, by id; boxes for other images are left out and counted.

    Raises:
        ClocError: It cannot be read, or a box is none.
    """

    distinct = False

    def __init__(self, path: str | Path, split: RegionSplit) -> None:
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ClocError(f"cannot read these proposals ({error})", file=path) from error
        if not isinstance(entries, list):
            raise ClocError("proposals are a JSON list, as COCO's results are", file=path)
        number = {name: k for k, name in enumerate(split.ids)}
        boxes: list[list[list[float]]] = [[] for _ in split.ids]
        scores: list[list[float]] = [[] for _ in split.ids]
        strange = 0
        for place, entry in enumerate(entries):
            image = number.get(str(entry.get("image_id"))) if isinstance(entry, Mapping) else None
            if image is None:
                strange += 1
                continue
            box, score = _box_of(entry, path, place)
            boxes[image].append(_clipped(box, split.sizes[image]))
            scores[image].append(score)
        self._found = [_of(some, of) for some, of in zip(boxes, scores, strict=True)]
        empty = sum(not some for some in boxes)
        self.described = (
            f"{len(entries) - strange} boxes of {Path(path).name}; {strange} for other images left out, "
            f"{empty} images without any"
        )

    def __call__(self, images: EncodedImages, numbers: Sequence[int]) -> list[Proposals]:
        """See :class:`ProposalSource`."""
        return [self._found[number] for number in numbers]


class DetectorProposals:
    """What one of the labelling detectors finds when it looks for the categories; the names it gives are not used.

    Args:
        spec: ``name`` or ``name:argument``; see :data:`cloc_mllm.labeling.stages.DETECTORS`.
        names: The categories.
        device: Where it runs.
    """

    distinct = False

    def __init__(self, spec: str, names: Sequence[str], device: str) -> None:
        self._detector = build_stage(DETECTORS, spec, device)
        self._names = list(names)
        self.described = f"detector {spec}, looking for {len(self._names)} categories"

    def __call__(self, images: EncodedImages, numbers: Sequence[int]) -> list[Proposals]:
        """See :class:`ProposalSource`."""
        found = self._detector(list(images.pictures), [self._names] * len(images.pictures))
        return [_of([one.box for one in some], [one.score for one in some]) for some in found]


def build_proposals(
    choice: str, split: RegionSplit, names: Sequence[str], device: str, grid: Mapping[str, Any] | None = None
) -> ProposalSource:
    """Make a source of boxes.

    Args:
        choice: One of :data:`KINDS`.
        split: The images.
        names: The categories, for a detector.
        device: Where a detector runs.
        grid: Fields of :class:`GridSearch` that differ from :data:`GRID`'s.

    Raises:
        ClocError: There is no such source, or it cannot be made.
    """
    kind, _, argument = choice.partition(":")
    if grid and kind != "grid":
        raise ClocError(f"grid is for proposals=grid, not for proposals={choice}")
    if kind == "ground-truth" and not argument:
        return GroundTruthProposals(split)
    if kind == "grid" and not argument:
        return GridProposals(_grid(grid or {}))
    if kind == "file" and argument:
        return FileProposals(argument, split)
    if kind == "detector" and argument:
        return DetectorProposals(argument, names, device)
    raise ClocError(f"there are no proposals '{choice}'", remedy=f"Choose one of {', '.join(KINDS)}.")


def _grid(given: Mapping[str, Any]) -> GridSearch:
    known = {"steps": GRID.steps, "scales": GRID.scales, "aspects": GRID.aspects}
    for key, value in given.items():
        several = key in ("scales", "aspects")
        values = value if several and isinstance(value, (list, tuple)) else [value]
        fits = all(isinstance(one, (int, float)) and not isinstance(one, bool) and one > 0 for one in values)
        if key not in known or not values or not fits or (not several and not isinstance(value, int)):
            raise ClocError(
                f"grid holds {key}: {value!r}",
                remedy="It takes steps (a number), scales and aspects (lists of numbers).",
            )
        known[key] = tuple(values) if several else value
    return GridSearch(**known)  # type: ignore[arg-type]


def _box_of(entry: Mapping[str, Any], path: str | Path, place: int) -> tuple[list[float], float]:
    """The xyxy box and the score of an entry of COCO's results."""
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
        score = float(entry.get("score", 1.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ClocError(f"entry {place} has no bbox of four numbers ({error})", file=path) from error
    if not (np.isfinite([x, y, width, height, score]).all() and width > 0 and height > 0 and 0 <= score <= 1):
        raise ClocError(
            f"entry {place} has the box {[x, y, width, height]} and the score {score}",
            file=path,
            remedy="A box is [x, y, width, height] with positive sides, a score between 0 and 1.",
        )
    return [x, y, x + width, y + height], score


def _clipped(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    return [min(max(value, 0.0), float(limit)) for value, limit in zip(box, size * 2, strict=True)]


def _of(boxes: Any, objectness: Any = None) -> Proposals:
    """Boxes without those that have no area left."""
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    certainty = np.ones(len(array)) if objectness is None else np.asarray(objectness, dtype=np.float64)
    kept = (array[:, 2:] > array[:, :2]).all(axis=1)
    return Proposals(array[kept], certainty[kept])
