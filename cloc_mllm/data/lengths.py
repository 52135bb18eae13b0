"""How long a sample will be, told from what stands in its file: to put samples of like length into a batch.

An estimate: letters by `LETTERS_A_TOKEN`, and the tokens of each image. No picture is decoded; where the number of an
image's tokens depends on its size, and the sample does not state it, the picture's header is read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cloc_mllm.data.messages import image_items, messages_of
from cloc_mllm.data.readers import resolve_image
from cloc_mllm.data.schema import kind_of
from cloc_mllm.errors import ClocError

LETTERS_A_TOKEN = 4.0
"""Of English, by the tokenizers of today's language models; a rule of thumb, which sorting does not depend on."""

REGION_TOKENS = 12
"""What a region adds as `<region>`, or as four numbers with brackets: between these."""

TokensOfImage = int | Callable[[int, int], int]
"""Tokens of an image: one number, or a function of its width and height in pixels."""


def text_tokens(*texts: str) -> int:
    """About how many tokens texts have."""
    return round(sum(map(len, texts)) / LETTERS_A_TOKEN)


def sample_length(raw: Mapping[str, Any], folder: Path | None, image_tokens: TokensOfImage) -> tuple[int, int]:
    """The number of images and the estimated number of tokens of a raw sample.

    Malformed parts count nothing: judging them is the loader's business.

    Args:
        raw: A conversation in either format, or a region-text sample (its caption alone counts).
        folder: Where relative image paths start.
        image_tokens: What an image takes.
    """
    if kind_of(raw) == "region-text":
        caption = raw.get("caption")
        images, tokens = [raw.get("image")], text_tokens(caption) if isinstance(caption, str) else 0
    else:
        try:
            messages = messages_of(raw)
        except (AttributeError, KeyError, StopIteration, TypeError):
            return 0, 0
        images, tokens = image_items(messages), _message_tokens(messages)
    return len(images), tokens + sum(_image_tokens(image, raw, folder, image_tokens, len(images)) for image in images)


def _message_tokens(messages: Sequence[Any]) -> int:
    texts, regions = [], 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for item in [{"text": content}] if isinstance(content, str) else content or []:
            if isinstance(item, Mapping):
                texts.append(item["text"] if isinstance(item.get("text"), str) else "")
                regions += item.get("type") == "region"
    return text_tokens(*texts) + REGION_TOKENS * regions


def _image_tokens(
    image: Any, raw: Mapping[str, Any], folder: Path | None, image_tokens: TokensOfImage, images: int
) -> int:
    if not callable(image_tokens):
        return image_tokens
    width, height = raw.get("width"), raw.get("height")
    if images == 1 and isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return image_tokens(width, height)
    try:
        return image_tokens(*_size(resolve_image(image, folder)))
    except (OSError, ValueError, TypeError, ClocError):
        return 0  # a broken picture: `on_bad_sample` decides when it is loaded


def _size(image: Any) -> tuple[int, int]:
    """Width and height; of a file, only the header is read."""
    if isinstance(image, Image.Image):
        return image.size
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return opened.size
