"""Reads a conversation in messages format: what is text, which images, which regions go in and which boxes come out.

A message is ``{"role": "system" | "user" | "assistant", "content": text | [items]}``. Items are ``{"type": "text",
"text"}``, ``{"type": "image", "image": PIL or path}`` and ``{"type": "region", "box": [x1, y1, x2, y2]}`` (or
``"point": [x, y]``) in pixels of the original image, with ``"image": k`` where it is not the image shown last before
it. In a user's turn a region is shown to the model. In an assistant's it is a box to be found, for the ``"phrase"``
right before it.
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
    """

    image: int
    box: torch.Tensor
    phrase: str = ""


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
        if "point" in item:
            raise ValueError("the assistant answers with boxes, not points")
        prompt, pixels, size = self._place(conversation, item, shown)
        phrase = item.get("phrase")
        if phrase is not None and (not isinstance(phrase, str) or not phrase.strip()):
            raise ValueError("the phrase of a region is blank or not a text")
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

    def _place(
        self, conversation: Conversation, item: Mapping[str, Any], shown: int
    ) -> tuple[Prompt, list[float], tuple[int, int]]:
        """A region in the model frame, its box in pixels, and the size of its image."""
        if ("box" in item) == ("point" in item):
            raise ValueError("a region has exactly one of 'box' and 'point'")
        count = len(conversation.images)
        number = item.get("image")
        if number is None:
            number = 0 if count == 1 else shown - 1
        if not isinstance(number, int) or not 0 <= number < count:
            where = f"image {number}" if "image" in item else "an image before it"
            raise ValueError(f"a region is on {where}, but the conversation has {count} images")
        width, height = conversation.images[number].size
        values = item["box"] if "box" in item else item["point"]
        check_prompt(values, width, height, 4 if "box" in item else 2)
        pixels = [float(value) for value in values] * (1 if "box" in item else 2)
        return Prompt(number, self.geometry(width, height).boxes_to_model([pixels])[0]), pixels, (width, height)


class _Parts:
    """The items of one message as they come together; texts that follow each other are one item."""

    def __init__(self, fence: Callable[[str], str]) -> None:
        self.items: list[dict[str, str]] = []
        self.text = ""
        """The text since the last item that was not one, as the person wrote it."""
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
