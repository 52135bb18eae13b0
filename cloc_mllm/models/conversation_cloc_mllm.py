"""Reads a conversation in messages format: what is text, which images, which regions go in and which boxes come out.

A message is ``{"role": "system" | "user" | "assistant", "content": text | [items]}``. Items are ``{"type": "text",
"text"}``, ``{"type": "image", "image": PIL or path}`` and ``{"type": "region", "box": [x1, y1, x2, y2]}`` (or
``"point": [x, y]``, ``"scribble": [[x, y], ...]``, ``"mask"``: see :func:`.region_shapes.read_mask`) in pixels of the
original image, with ``"image": k`` where it is not the image shown last before it. In a user's turn a region is shown
to the model. In an assistant's it is a box to be found, for the ``"phrase"`` right before it; boxes that follow each
other are all of one phrase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .answer_text import phrase_before
from .boxes import BoxCodec
from .geometry import Geometry
from .image_processing_cloc import load_image
from .processing_cloc import check_prompt
from .region_shapes import SHAPE_KINDS, mask_shape, scribble_shape

ROLES = ("system", "user", "assistant")
REGION_FORMATS = ("token", "coords", "both")


class ConversationError(ValueError):
    """A conversation of a batch is wrong.

    Attributes:
        index: Its place in the batch, from 0.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"conversation {index}: {problem}")
        self.index = index
        self.problem = problem


@dataclass
class Prompt:
    """A region that is shown to the model, or a box to be found.

    Attributes:
        image: The image it is on, counted within the conversation.
        box: ``(4,)`` float32 xyxy, normalised, model frame; no size for a point.
        phrase: What is to be found.
        points: ``(P, 2)`` float32, normalised, model frame, on a free-form region; ``None`` for a box or a point.
    """

    image: int
    box: torch.Tensor
    phrase: str = ""
    points: torch.Tensor | None = None


@dataclass
class Conversation:
    """A conversation taken apart.

    Attributes:
        messages: What the template renders: items of type ``text``, ``image``, ``region`` and ``ground``.
        images: The pictures, in the order of their ``image`` items.
        regions: One for each ``region`` item.
        grounds: One for each ``ground`` item.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    regions: list[Prompt] = field(default_factory=list)
    grounds: list[Prompt] = field(default_factory=list)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each picture in pixels."""
        return [picture.size for picture in self.images]


class ConversationReader:
    """Turns messages into a :class:`Conversation`.

    Args:
        geometry: Where an image of a width and height lies in the model frame.
        codec: Writes boxes as text.
        fence: Guards text that people wrote; see :func:`.chat_template.fence`.
        region_format: How a user's region is written: ``token`` (``<region>``), ``coords`` or ``both``.
        grounding: How an assistant's box is written: ``head`` (``<ground>``) or ``text`` (coordinates).
    """

    def __init__(
        self,
        geometry: Callable[[int, int], Geometry],
        codec: BoxCodec,
        fence: Callable[[str], str],
        region_format: str,
        grounding: str,
    ) -> None:
        self.geometry, self.codec, self.fence = geometry, codec, fence
        self.region_format, self.grounding = region_format, grounding

    def fill(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """A copy of messages whose ``image`` items hold their pictures, loaded.

        Args:
            messages: The messages.
            images: Pictures for the ``image`` items that hold none, in order.

        Raises:
            ValueError: If a picture cannot be read, or there are more or fewer than needed.
        """
        if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError("it is not a list of messages")
        empty = sum(picture_of(item) is None for item in image_items(messages))
        given = list(images or ())
        if empty != len(given):
            raise ValueError(f"{empty} image items hold no picture, but {len(given)} pictures were passed beside them")
        rest = iter(given)

        def loaded(item: Any) -> Any:
            if not isinstance(item, Mapping) or item.get("type") != "image":
                return item
            source = picture_of(item)
            return {"type": "image", "image": load_image(next(rest) if source is None else source)}

        return [
            {**m, "content": [loaded(item) for item in m["content"]]}
            if isinstance(m.get("content"), (list, tuple))
            else dict(m)
            for m in messages
        ]

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """Take messages that :meth:`fill` returned apart.

        Raises:
            ValueError: Saying what is wrong and with which message.
        """
        conversation = Conversation(images=[item["image"] for item in image_items(messages)])
        shown = 0
        for number, message in enumerate(messages):
            role = message.get("role")
            if role not in ROLES:
                raise ValueError(f"message {number} has the role {role!r}: use one of {', '.join(ROLES)}")
            try:
                content, shown = self._content(conversation, role, message.get("content"), shown)
            except (ValueError, TypeError) as error:
                raise ValueError(f"message {number} ({role}): {error}") from error
            conversation.messages.append({"role": role, "content": content})
        return conversation

    def _content(
        self, conversation: Conversation, role: str, content: Any, shown: int
    ) -> tuple[list[dict[str, str]], int]:
        """Items for the template, and how many images have been shown by the end of the message."""
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)) or not content:
            raise ValueError("the content is neither a text nor a list of items")
        parts = _Parts(self.fence)
        for item in content:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "text" and isinstance(item.get("text"), str):
                parts.add_text(item["text"])
            elif kind == "image" and role == "user":
                parts.add("image")
                shown += 1
            elif kind == "region" and role == "user":
                self._show_region(conversation, parts, item, shown)
            elif kind == "region" and role == "assistant":
                self._ask_box(conversation, parts, item, shown)
            else:
                raise ValueError(f"an item of type {kind!r} cannot be in a message of the {role}, or holds no text")
        if not any(item["type"] != "text" or item["text"].strip() for item in parts.items):
            raise ValueError("empty text")
        return parts.items, shown

    def _show_region(self, conversation: Conversation, parts: _Parts, item: Mapping[str, Any], shown: int) -> None:
        prompt, pixels, size = self._place(conversation, item, shown)
        if self.region_format != "coords":
            conversation.regions.append(prompt)
            parts.add("region")
        if self.region_format != "token":
            parts.add_text(" " * (self.region_format == "both") + self.codec.encode(pixels, *size))

    def _ask_box(self, conversation: Conversation, parts: _Parts, item: Mapping[str, Any], shown: int) -> None:
        for kind in SHAPE_KINDS:
            if kind != "box" and kind in item:
                raise ValueError(f"the assistant answers with boxes, not with a {kind}")
        prompt, pixels, size = self._place(conversation, item, shown)
        phrase = item.get("phrase")
        if phrase is not None and (not isinstance(phrase, str) or not phrase.strip()):
            raise ValueError("the phrase of a region is blank or not a text")
        follows = parts.phrase is not None and not phrase_before(parts.text)
        if follows and (phrase is None or phrase.strip() == parts.phrase):
            prompt.phrase = parts.phrase or ""  # one more box of the same phrase, which is said once
        else:
            # The phrase stands right before its box: it is written unless the text has just said it.
            if phrase is not None and not parts.text.rstrip().endswith(phrase.strip()):
                parts.add_text(phrase)
            prompt.phrase = phrase.strip() if phrase is not None else phrase_before(parts.text)
        if self.grounding == "head":
            # No space before `<ground>`: the language model would have to learn to say a lone space first.
            parts.strip_end()
            conversation.grounds.append(prompt)
            parts.add("ground")
        else:
            if parts.text and not parts.text[-1].isspace():
                parts.add_text(" ")
            parts.add_text(self.codec.encode(pixels, *size))
        parts.phrase = prompt.phrase

    def _place(
        self, conversation: Conversation, item: Mapping[str, Any], shown: int
    ) -> tuple[Prompt, list[float], tuple[int, int]]:
        """A region in the model frame, its box in pixels, and the size of its image."""
        kinds = [kind for kind in SHAPE_KINDS if kind in item]
        if len(kinds) != 1:
            raise ValueError(f"a region has exactly one of {', '.join(map(repr, SHAPE_KINDS))}")
        count = len(conversation.images)
        number = item.get("image")
        if number is None:
            number = 0 if count == 1 else shown - 1
        if not isinstance(number, int) or not 0 <= number < count:
            where = f"image {number}" if "image" in item else "an image before it"
            raise ValueError(f"a region is on {where}, but the conversation has {count} images")
        width, height = conversation.images[number].size
        place, values = self.geometry(width, height), item[kinds[0]]
        points: torch.Tensor | None = None
        if kinds[0] in ("mask", "scribble"):
            shape = (mask_shape if kinds[0] == "mask" else scribble_shape)(values, width, height)
            pixels, points = shape.box, place.points_to_model(torch.from_numpy(shape.points))
        else:
            check_prompt(values, width, height, 4 if "box" in item else 2)
            pixels = [float(value) for value in values] * (1 if "box" in item else 2)
        prompt = Prompt(number, place.boxes_to_model([pixels])[0], points=points)
        return prompt, pixels, (width, height)


class _Parts:
    """The items of one message as they come together; texts that follow each other are one item."""

    def __init__(self, fence: Callable[[str], str]) -> None:
        self.items: list[dict[str, str]] = []
        self.text = ""
        """The text since the last item that was not one, as the person wrote it."""
        self.phrase: str | None = None
        """The phrase of the last box that was asked for; ``None`` before the first."""
        self.fence = fence

    def add(self, kind: str) -> None:
        self.items.append({"type": kind})
        self.text = ""

    def add_text(self, text: str) -> None:
        if not self.text and text:
            self.items.append({"type": "text", "text": ""})
        self.text += text
        if self.text:
            self.items[-1]["text"] = self.fence(self.text)

    def strip_end(self) -> None:
        if not self.text:
            return
        self.text = self.text.rstrip()
        if self.text:
            self.items[-1]["text"] = self.fence(self.text)
        else:
            self.items.pop()


def in_reading_order(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of messages in which an assistant's boxes for one phrase stand from left to right, then top to bottom.

    What is learnt must be one answer, and the boxes of a phrase have no order of their own. Of one phrase are those on
    one image between which no other phrase is said, in the text or in their own ``phrase``.
    """
    ordered: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if message.get("role") != "assistant" or not isinstance(content, (list, tuple)):
            ordered.append(dict(message))
            continue
        items = list(content)
        run: list[int] = []
        for place, item in enumerate(items):
            if run and not _goes_on(items[run[0]], item):
                _sort_boxes(items, run)
                run = []
            if isinstance(item, Mapping) and item.get("type") == "region":
                run.append(place)
        _sort_boxes(items, run)
        ordered.append({**message, "content": items})
    return ordered


def _goes_on(first: Mapping[str, Any], item: Any) -> bool:
    """Whether a box, or what stands between two, belongs to the phrase of the first box of a run."""
    if not isinstance(item, Mapping):
        return False
    if item.get("type") == "text":
        return isinstance(item.get("text"), str) and not phrase_before(item["text"])
    return item.get("image") == first.get("image") and item.get("phrase") in (None, first.get("phrase"))


def _sort_boxes(items: list[Any], run: list[int]) -> None:
    """Deal the boxes of a run out anew, the items' other keys as they stand; malformed ones are left to the reader."""
    boxes = [items[place].get("box") for place in run]
    if all(isinstance(box, (list, tuple)) and len(box) == 4 for box in boxes):
        for place, box in zip(run, sorted(boxes), strict=True):
            items[place] = {**items[place], "box": box}


def image_items(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The ``image`` items of messages, in order."""
    for message in messages:
        content = message.get("content")
        for item in content if isinstance(content, (list, tuple)) else ():
            if isinstance(item, Mapping) and item.get("type") == "image":
                yield item


def picture_of(item: Mapping[str, Any]) -> Any:
    """The picture, or the path of one, that an ``image`` item holds; ``None`` if it holds none."""
    return item["image"] if item.get("image") is not None else item.get("path")
