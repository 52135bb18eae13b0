"""One sample, taken apart once: its kind, messages, pictures and regions, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.messages import Message, image_items, messages_of, problems_before_messages, with_mask_paths
from cloc_mllm.data.readers import Sample
from cloc_mllm.data.schema import (
    REGION_KINDS,
    Problem,
    Size,
    box_problems,
    conversation_problems,
    kind_of,
    region_text_problems,
    text_problems,
)


@dataclass(frozen=True)
class SampleView:
    """A raw sample and what its parts are; of a malformed one, what could be told.

    Attributes:
        sample: As read.
        kind: "region-text", "conversation" or "question".
        messages: Of a conversation that could be brought into messages; else empty.
        images: The images it names, in order.
        problems: What keeps it from being brought into messages.
    """

    sample: Sample
    kind: str
    messages: list[Message]
    images: list[Any]
    problems: list[Problem]

    @classmethod
    def of(cls, sample: Sample, folder: Path | None) -> SampleView:
        """Take a sample apart; `folder` is where its relative paths start."""
        kind = kind_of(sample)
        if kind == "region-text":
            return cls(sample, kind, [], [sample.get("image")], [])
        problems = list(problems_before_messages(sample))
        messages = [] if problems else with_mask_paths(messages_of(sample), folder)
        images = image_items(messages) if messages else [sample["image"]] if "image" in sample else []
        return cls(sample, kind, messages, images, problems)


@dataclass(frozen=True)
class RegionView:
    """A region of a sample.

    Attributes:
        form: "box", "point", "mask" or "scribble".
        shape: As found in the file.
        text: What is in it, if the sample says so.
        image: Which of the sample's images it is on, counted from 0.
        role: "labelled" in a region-text sample; else "asked about", "to be found", or "truth", beside a question.
        score: As found in the file.
    """

    form: str
    shape: Any
    text: str | None
    image: int
    role: str
    score: Any = None


def regions_of(view: SampleView) -> Iterator[RegionView]:
    """The regions of a sample, malformed shapes included; items that are no regions are left to the checks."""
    if view.kind == "region-text":
        regions = view.sample.get("regions")
        for region in regions if isinstance(regions, (list, tuple)) else ():
            if isinstance(region, dict):
                text = region.get("text")
                shown = text if isinstance(text, str) else None
                yield RegionView("box", region.get("box"), shown, 0, "labelled", region.get("score"))
        return
    shown_images = 0
    for message in view.messages:
        content = message.get("content") if isinstance(message, dict) else None
        for item in content if isinstance(content, (list, tuple)) else ():
            if not isinstance(item, dict):
                continue
            shown_images += item.get("type") == "image"
            forms = [form for form in REGION_KINDS if form in item]
            if item.get("type") == "region" and len(forms) == 1:
                image = item.get("image", shown_images - 1)
                role = "to be found" if message.get("role") == "assistant" else "asked about"
                phrase = item.get("phrase")
                text = phrase if isinstance(phrase, str) else None
                yield RegionView(forms[0], item[forms[0]], text, image if isinstance(image, int) else -1, role)
    if view.kind == "question" and "box" in view.sample:
        yield RegionView("box", view.sample["box"], None, 0, "truth")


def sample_problems(
    sample: Sample, folder: Path | None, sizes: Callable[[Any, Path | None], Size | Problem]
) -> list[Problem]:
    """All that is wrong with one sample, its images included.

    Args:
        sample: The raw sample.
        folder: Where its relative image paths start.
        sizes: Looks images up.
    """
    view = SampleView.of(sample, folder)
    return problems_of(view, [sizes(image, folder) for image in view.images])


def problems_of(view: SampleView, looked_up: Sequence[Size | Problem | None]) -> list[Problem]:
    """All that is wrong with one sample.

    Args:
        view: The sample.
        looked_up: For each of its images the size, or what is wrong with it, or None if that is not known.
    """
    found = [*view.problems, *(size for size in looked_up if isinstance(size, Problem))]
    known = [None if isinstance(size, Problem) else size for size in looked_up]
    if view.kind == "region-text":
        return found + list(region_text_problems(view.sample, known[0]))
    if view.messages or not found:
        found += conversation_problems(view.sample, view.messages, known, answered=view.kind == "conversation")
    if view.kind == "question":
        found += _question_problems(view.sample, known)
    return found


def _question_problems(sample: Sample, sizes: Sequence[Size | None]) -> Iterator[Problem]:
    size = sizes[0] if len(sizes) == 1 else None
    yield from text_problems(sample.get("answer"), "the answer")
    # In a table every question has every column: what one has not is null there.
    if sample.get("box") is not None:
        yield from box_problems(sample["box"], size, "the box to be found")
    asked = sample.get("boxes_in")
    if asked is not None and not isinstance(asked, (list, tuple)):
        yield Problem("'boxes_in' is not a list of boxes", "Write it as [[x1, y1, x2, y2], ...] in pixels.")
        return
    for box in asked or ():
        yield from box_problems(box, size, "a box asked about")


def sound_boxes(view: SampleView) -> list[RegionView]:
    """The regions of a sample that are well-formed boxes on its first image."""
    return [
        region
        for region in regions_of(view)
        if region.form == "box" and region.image == 0 and next(box_problems(region.shape, None), None) is None
    ]
