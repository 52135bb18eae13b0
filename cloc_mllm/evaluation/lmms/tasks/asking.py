"""How the tasks' questions are put: `doc_to_visual`, `doc_to_text` and `doc_to_messages` of lmms-eval.

This package's models take regions as regions. All others are told of them by coordinates in the text, and are told
how to write boxes; `lmms_eval_specific_kwargs` of the task's YAML says which, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.tasks.documents import picture, picture_size, question_items
from cloc_mllm.inference.templates import REGION, Templates
from cloc_mllm.models.boxes import BoxCodec

_SHARES = BoxCodec("norm1")


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The picture of a document."""
    if "phrase" in doc:
        return [picture(doc)]
    return [item["image"] for item in question_items(doc, opened=True) if item["type"] == "image"]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question in words, regions as coordinates: what models without regions are asked, and what is logged."""
    words = lmms_eval_specific_kwargs or {}
    after = str(words.get("post_prompt", ""))
    if "phrase" in doc:
        return Templates(ground=words.get("question", Templates.ground)).where_is(doc["phrase"]) + after
    text = ""
    for item in question_items(doc, opened=False):
        if item["type"] == "region":
            text += REGION if words.get("regions") == "item" else in_words(item, picture_size(doc))
        elif item["type"] == "text":
            text += item["text"]
    return text.strip() + after


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The question as messages: pictures under `url`, as lmms-eval has them, and regions where the model takes them."""
    words = lmms_eval_specific_kwargs or {}
    if "phrase" in doc or words.get("regions") != "item":
        shown = [{"type": "image", "url": one} for one in doc_to_visual(doc)]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": doc_to_text(doc, words)}]}]
    items = question_items(doc, opened=True)
    shown = [{"type": "image", "url": item["image"]} if item["type"] == "image" else item for item in items]
    return [{"role": "user", "content": shown}]


def in_words(item: Mapping[str, Any], size: tuple[int, int]) -> str:
    """A region as coordinates, shares (0 to 1) of the picture's width and height.

    Args:
        item: A region of a message, in pixels.
        size: Width and height of its picture in pixels.

    Returns:
        `[x1, y1, x2, y2]` for a box, `[x, y]` for a point, and the enclosing box of a scribble.

    Raises:
        ClocError: It is of a kind that words cannot say.
    """
    if "box" in item:
        return _SHARES.encode(item["box"], *size)
    if "point" in item:
        return "[" + ", ".join(f"{value / side:.3f}" for value, side in zip(item["point"], size, strict=True)) + "]"
    if "scribble" in item:
        xs, ys = zip(*item["scribble"], strict=True)
        return _SHARES.encode([min(xs), min(ys), max(xs), max(ys)], *size)
    kind = next((key for key in item if key != "type"), "region")
    raise ClocError(f"a {kind} cannot be said in words", remedy="Ask a model that takes regions.")
