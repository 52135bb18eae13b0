"""What the texts of an image's regions say of each other: which phrase fits which region, and which only one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def words_of(text: str) -> frozenset[str]:
    """The words of a text, in lower case."""
    return frozenset(text.lower().split())


def fits(phrase: str, text: str) -> bool:
    """Whether a phrase is taken to fit a region with that text: all of its words are in the text.

    >>> fits("red circle", "striped red circle")
    True
    """
    return words_of(phrase) <= words_of(text)


def unique_regions(regions: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each region of an image, whether its text names it alone.

    A region may say so itself ("unique"); otherwise its text is taken to fit another region as well as `fits` tells
    ("red circle" and "striped red circle"). Texts that say less than the truth can hide an ambiguity from this rule.
    """
    bags = [words_of(str(region["text"])) for region in regions]
    return [
        bool(region["unique"])
        if isinstance(region.get("unique"), bool)
        else not any(k != other and bags[k] <= bags[other] for other in range(len(bags)))
        for k, region in enumerate(regions)
    ]
