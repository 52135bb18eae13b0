"""A picture as the builders see it: the things in it, what is said of each, and how one is pointed at."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloc_mllm.data.english import content_words, without_article
from cloc_mllm.data.phrases import words_of
from cloc_mllm.data.schema import raise_first, shape_problems

Box = tuple[float, ...]

SHAPES = ("box", "point", "mask", "mixed")
_DRAWS = 8
_SPREAD = 0.15


@dataclass
class Thing:
    """All that is said of one box.

    Attributes:
        box: xyxy in pixels of the original image.
        texts: Distinct texts, in the order of the file.
        stated: For each text whether the data says that it names this thing alone; `None` where it says nothing.
        mask: Its mask, in a form that `region_shapes.read_mask` takes, or `None`.
    """

    box: Box
    texts: list[str] = field(default_factory=list)
    stated: list[bool | None] = field(default_factory=list)
    mask: Any = None


class Picture:
    """The things of a region-text sample; regions with the same box are one thing.

    Args:
        sample: A sound sample.
        size: Width and height in pixels.

    Attributes:
        free: Things that no turn of the conversation has told of yet, by their numbers.
    """

    def __init__(self, sample: Mapping[str, Any], size: tuple[int, int]) -> None:
        self.size = size
        self.captions = [str(text) for text in sample.get("captions") or [sample["caption"]]]
        things: dict[Box, Thing] = {}
        for region in sample["regions"]:
            box = tuple(float(value) for value in region["box"])
            thing = things.setdefault(box, Thing(box))
            if region["text"].strip() not in thing.texts:
                thing.texts.append(region["text"].strip())
                unique = region.get("unique")
                thing.stated.append(unique if isinstance(unique, bool) else None)
            attributes = region.get("attributes")
            if thing.mask is None and isinstance(attributes, Mapping):
                thing.mask = attributes.get("mask")
        self.things = list(things.values())
        self.free = set(range(len(self.things)))
        self._said = [[words_of(without_article(text)) for text in thing.texts] for thing in self.things]

    def words(self) -> set[str]:
        """The words of everything that is said of the picture."""
        return content_words(" ".join([*self.captions, *(text for thing in self.things for text in thing.texts)]))

    def fitting(self, phrase: str) -> list[int]:
        """The things that a phrase fits, as `phrases.fits` tells, articles aside."""
        wanted = words_of(without_article(phrase))
        return [number for number, said in enumerate(self._said) if any(wanted <= words for words in said)]

    def named(self, phrase: str) -> list[int]:
        """The things of which a text is the phrase and nothing more, articles aside."""
        wanted = words_of(without_article(phrase))
        return [number for number, said in enumerate(self._said) if wanted in said]

    def is_unique(self, number: int, place: int) -> bool:
        """Whether a text of a thing names it alone: as the data says, else if it fits no other thing."""
        thing = self.things[number]
        stated = thing.stated[place]
        return self.fitting(thing.texts[place]) == [number] if stated is None else stated

    def located(self, number: int, shape: str, draw: random.Random, counts: Counter[str]) -> dict[str, Any]:
        """A thing as a region that is shown.

        Args:
            number: The thing.
            shape: One of :data:`SHAPES`. Where it cannot be had, the box is shown, which is counted.
            draw: Decides between shapes, and where a point is.
            counts: Regions shown, by shape.

        Returns:
            `{"box"}`, `{"point"}` or `{"mask"}`, in pixels.

        Raises:
            ClocError: Its mask cannot be read.
        """
        thing = self.things[number]
        if shape == "mixed":
            shape = draw.choice(("box", "point") if thing.mask is None else ("box", "point", "mask"))
        if shape in ("mask", "point") and thing.mask is not None:
            raise_first(shape_problems("mask", thing.mask, self.size, "the mask of a region"), None, None)
        if shape == "mask" and thing.mask is not None:
            counts["regions_shown_as_mask"] += 1
            return {"mask": thing.mask}
        if shape == "point" and (point := self._point(number, draw)) is not None:
            counts["regions_shown_as_point"] += 1
            return {"point": point}
        counts["regions_shown_as_box"] += 1
        counts["regions_shown_as_box_instead"] += shape != "box"
        return {"box": list(thing.box)}

    def _point(self, number: int, draw: random.Random) -> list[float] | None:
        """A point on a thing: on its mask, else near the middle of its box, outside of smaller boxes.

        Several are tried; `None` if each lies on something else.
        """
        thing = self.things[number]
        own = _area(thing.box)
        others = [other.box for k, other in enumerate(self.things) if k != number and _area(other.box) <= own]
        points = (
            _points_of_mask(thing.mask, self.size, draw) if thing.mask is not None else _points_of_box(thing.box, draw)
        )
        for point in points:
            if thing.mask is not None or not any(_holds(box, point) for box in others):
                return [round(value, 2) for value in point]
        return None


def _points_of_box(box: Box, draw: random.Random) -> list[tuple[float, float]]:
    """Points about the middle of a box, normally distributed, cut off at its edges."""
    found = []
    for _ in range(_DRAWS):
        x, y = (
            min(max(draw.gauss((low + high) / 2, _SPREAD * (high - low)), low), high)
            for low, high in ((box[0], box[2]), (box[1], box[3]))
        )
        found.append((x, y))
    return found


def _points_of_mask(mask: Any, size: tuple[int, int], draw: random.Random) -> list[tuple[float, float]]:
    """One of a few points spread over a mask, off its rim."""
    from cloc_mllm.models.region_shapes import mask_shape  # brings all of transformers

    points = mask_shape(mask, *size).points
    x, y = points[draw.randrange(len(points))].tolist()
    return [(x, y)]


def _holds(box: Sequence[float], point: tuple[float, float]) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
