"""What a sample may look like, and everything that can be wrong with one.

Two kinds of sample exist: *region-text* (an image, a caption, boxes with texts: pre-training) and *conversation*
(messages with images and regions: tuning and evaluation). Every rule is written once, as a generator of
:class:`Problem`; reading for training raises the first one, `cloc-mllm data check` lists them all.
Boxes are xyxy in pixels of the original image (after its EXIF rotation) everywhere in this file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from cloc_mllm.errors import ClocError

Size = tuple[int, int]

SAMPLE_KEYS = frozenset({"id", "image", "width", "height", "caption", "captions", "regions", "source"})
REGION_KEYS = frozenset({"box", "text", "score", "unique", "attributes"})
CONVERSATION_KEYS = frozenset(
    {"id", "image", "images", "width", "height", "messages", "conversations", "regions", "task", "source"}
)
QUESTION_KEYS = CONVERSATION_KEYS.union(
    ["kind", "answer", "box", "boxes_in", "heldout", "majority", "negative", "synonyms", "negative_synonyms"]
)
MESSAGE_KEYS = frozenset({"role", "content"})
REGION_KINDS = ("box", "point", "mask", "scribble")
ITEM_KEYS = {
    "text": frozenset({"type", "text"}),
    "image": frozenset({"type", "image"}),
    "region": frozenset({"type", *REGION_KINDS, "image", "phrase"}),
}
ROLES = ("system", "user", "assistant")
PLACEHOLDERS = ("<image>", "<region>", "<ground>")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""What stands for no letter in any script: control characters but tab and line breaks, and halves of a character. Marks
that scripts need, such as joiners and directions, are none of these."""
_CONTROL_RUN = re.compile(f" *{_CONTROL.pattern}[ {_CONTROL.pattern[1:-1]}]*")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a sample.

    Attributes:
        problem: What is wrong, as a clause.
        remedy: What to do about it.
    """

    problem: str
    remedy: str

    def error(self, file: str | None, sample: str | int | None) -> ClocError:
        """The exception that reports this problem of a sample of a file."""
        return ClocError(self.problem, file=file, sample=sample, remedy=self.remedy)


def raise_first(problems: Iterator[Problem], file: str | None, sample: str | int | None) -> None:
    """Raises the first problem as a :class:`ClocError`; returns if there is none."""
    for problem in problems:
        raise problem.error(file, sample)


def kind_of(sample: Mapping[str, Any]) -> str:
    """What a sample is, told by its keys: "question", "conversation" or "region-text"."""
    if "messages" in sample or "conversations" in sample:
        return "question" if "answer" in sample else "conversation"
    return "region-text"


def key_problems(mapping: Mapping[str, Any], known: Collection[str], what: str) -> Iterator[Problem]:
    """Unknown keys, with the nearest known one as a suggestion."""
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
            yield Problem(f"unknown key '{key}' in {what}", hint)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def text_problems(value: Any, what: str) -> Iterator[Problem]:
    """A text that is missing, is not a string, or is empty."""
    if not isinstance(value, str):
        yield Problem(f"{what} is missing or not a string", "Give it a text.")
    elif not value.strip():
        yield Problem(f"empty text: {what} is blank", "Give it a text, or leave the sample out.")
    else:
        yield from control_problems(value, what)


def control_problems(text: str, what: str) -> Iterator[Problem]:
    """A text that holds a control character, or half of a surrogate pair, which no file can hold."""
    if found := _CONTROL.search(text):
        remedy = "Take it out; `cloc-mllm data convert` does."
        yield Problem(f"{what} holds the control character U+{ord(found.group()):04X}", remedy)


def cleaned(text: str, counts: Counter[str]) -> str:
    """A text without control characters, a blank in place of each run within it; such texts are counted."""
    if _CONTROL.search(text) is None:
        return text
    counts["texts_cleaned"] += 1
    return _CONTROL_RUN.sub(lambda run: "" if run.start() == 0 or run.end() == len(text) else " ", text)


def box_problems(box: Any, size: Size | None, what: str = "box") -> Iterator[Problem]:
    """Everything that can be wrong with a box.

    Args:
        box: The box as found in the file.
        size: Width and height of its image, or None where that is unknown.
        what: What to call the box in the message.
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(value) for value in box):
        yield Problem(f"{what} {box!r} is not a list of 4 numbers", "Write it as [x1, y1, x2, y2] in pixels.")
        return
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        axis = "x2 < x1" if x2 < x1 else "y2 < y1"
        remedy = "Boxes are [x1, y1, x2, y2]; if yours are [x, y, width, height], convert them."
        yield Problem(f"{what} {list(box)} has {axis}", remedy)
        return
    if x2 == x1 or y2 == y1:
        yield Problem(
            f"{what} {list(box)} has no area", "Leave the region out, or give it a box with x1 < x2, y1 < y2."
        )
    if size is not None and (x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]):
        remedy = "Boxes are in pixels of the original image, after its EXIF rotation; clip or rescale it."
        yield Problem(f"{what} {list(box)} is outside the image, which is {size[0]} x {size[1]} pixels", remedy)


def point_problems(point: Any, size: Size | None, what: str = "point") -> Iterator[Problem]:
    """Everything that can be wrong with a point [x, y] in pixels."""
    if not isinstance(point, (list, tuple)) or len(point) != 2 or not all(_is_number(value) for value in point):
        yield Problem(f"{what} {point!r} is not a list of 2 numbers", "Write it as [x, y] in pixels.")
    elif size is not None and not (0 <= point[0] <= size[0] and 0 <= point[1] <= size[1]):
        yield Problem(
            f"{what} {list(point)} is outside the image, which is {size[0]} x {size[1]} pixels",
            "Points are in pixels of the original image, after its EXIF rotation.",
        )


def shape_problems(kind: str, shape: Any, size: Size | None, what: str) -> Iterator[Problem]:
    """Everything that can be wrong with a mask or a scribble, which is read for it; a path as it stands.

    Args:
        kind: "mask" or "scribble".
        shape: As found in the file.
        size: Width and height of its image, or None where that is unknown: then nothing can be said.
        what: What to call it in the message.
    """
    if size is None:
        return
    # Only here: it brings all of transformers, and most programs that read data have no masks.
    from cloc_mllm.models.region_shapes import read_mask, scribble_shape

    try:
        (read_mask if kind == "mask" else scribble_shape)(shape, *size)
    except ValueError as error:
        yield Problem(f"{what}: {error}", "docs/mllm-regions.md has the forms of a region.")


def size_problems(sample: Mapping[str, Any], size: Size | None) -> Iterator[Problem]:
    """A stated width or height that is no positive number, or is not the picture's."""
    for k, name in enumerate(("width", "height")):
        stated = sample.get(name)
        if stated is None:
            continue
        if not _is_number(stated) or stated <= 0:
            yield Problem(f"{name} is {stated!r}, not a positive number of pixels", "Correct it or leave it out.")
        elif size is not None and stated != size[k]:
            remedy = "Boxes made for another size of the picture would be wrong too: check where both come from."
            yield Problem(f"{name} is stated as {stated}, but the picture's is {size[k]}", remedy)


def region_text_problems(sample: Mapping[str, Any], size: Size | None) -> Iterator[Problem]:
    """Everything wrong with a region-text sample, apart from its image file.

    Args:
        sample: The sample as read, `{"image", "caption", "regions": [{"box", "text", ...}], ...}`.
        size: Width and height of its picture, or None if the picture could not be read.
    """
    yield from key_problems(sample, SAMPLE_KEYS, "the sample")
    yield from size_problems(sample, size)
    yield from text_problems(sample.get("caption"), "the caption")
    captions = sample.get("captions")
    if captions is not None:
        if not isinstance(captions, (list, tuple)) or not captions:
            yield Problem("'captions' is not a list of texts", "Give a list, or leave it out.")
        else:
            for k, caption in enumerate(captions):
                yield from text_problems(caption, f"caption {k}")
    regions = sample.get("regions")
    if not isinstance(regions, (list, tuple)):
        yield Problem("'regions' is missing or not a list", "An image without regions has an empty list.")
        return
    for k, region in enumerate(regions):
        what = f"region {k}"
        if not isinstance(region, Mapping):
            yield Problem(f"{what} is not an object", 'Write it as {"box": [x1, y1, x2, y2], "text": "..."}.')
            continue
        yield from key_problems(region, REGION_KEYS, what)
        yield from box_problems(region.get("box"), size, f"{what}'s box")
        yield from text_problems(region.get("text"), f"the text of {what}")
        if region.get("score") is not None and not _is_number(region["score"]):
            yield Problem(f"the score of {what} is {region['score']!r}, not a number", "Correct it or leave it out.")
        if not isinstance(region.get("unique"), (bool, NoneType)):
            yield Problem(
                f"'unique' of {what} is {region['unique']!r}, not true or false", "Correct it or leave it out."
            )


def conversation_problems(
    sample: Mapping[str, Any], messages: Any, sizes: Sequence[Size | None], *, answered: bool = True
) -> Iterator[Problem]:
    """Everything wrong with a conversation in messages format, apart from its image files.

    Args:
        sample: The sample as read; its keys are checked.
        messages: Its messages (converted first, if it came in LLaVA's format).
        sizes: Width and height of each image the messages hold, in order; None where one could not be read.
        answered: Whether the conversation must end with an assistant's turn (False for a question).
    """
    yield from key_problems(sample, CONVERSATION_KEYS if answered else QUESTION_KEYS, "the sample")
    yield from size_problems(sample, sizes[0] if len(sizes) == 1 else None)
    if not isinstance(messages, (list, tuple)) or not messages:
        yield Problem("'messages' is not a list of turns", 'A turn is {"role": "user", "content": [...]}.')
        return
    expected, shown = "user", 0
    for k, message in enumerate(messages):
        what = f"message {k}"
        if not isinstance(message, Mapping):
            yield Problem(f"{what} is not an object", 'A turn is {"role": "user", "content": [...]}.')
            return
        yield from key_problems(message, MESSAGE_KEYS, what)
        role = message.get("role")
        if role not in ROLES:
            yield Problem(f"{what} has the role {role!r}", f"Roles are {', '.join(ROLES)}.")
        elif role == "system" and k > 0:
            yield Problem(f"{what} is a system message", "Only the first message may be one.")
        elif role != "system":
            if role != expected:
                yield Problem(f"{what} is a turn of the {role}, not of the {expected}", "User and assistant alternate.")
            expected = "assistant" if role == "user" else "user"
        content = message.get("content")
        yield from content_problems(content, role, what, sizes, shown)
        shown += sum(_type(item) == "image" for item in content) if isinstance(content, (list, tuple)) else 0
    last = messages[-1].get("role") if isinstance(messages[-1], Mapping) else None
    wanted = "assistant" if answered else "user"
    if last != wanted:
        yield Problem(f"the last message is not the {wanted}'s", "Add the turn that is missing, or drop the last one.")


def _type(item: Any) -> Any:
    return item.get("type") if isinstance(item, Mapping) else None


def content_problems(
    content: Any, role: Any, what: str, sizes: Sequence[Size | None], shown: int = 0
) -> Iterator[Problem]:
    """Everything wrong with the content of one message.

    Args:
        content: A text or a list of items.
        role: Who speaks.
        what: What to call the message.
        sizes: Width and height of every image of the conversation, None where one could not be read.
        shown: Number of images that earlier messages hold: a region is on the one shown last, unless it says which.
    """
    if isinstance(content, str):
        yield from text_problems(content, f"the content of {what}")
        yield from _placeholder_problems(content, what)
        return
    if not isinstance(content, (list, tuple)) or not content:
        yield Problem(f"the content of {what} is neither a text nor a list of items", "Give it some content.")
        return
    for item in content:
        kind = _type(item)
        if not isinstance(kind, str) or kind not in ITEM_KEYS:
            yield Problem(f"{what} has an item of type {kind!r}", f"Types are {', '.join(ITEM_KEYS)}.")
            continue
        yield from key_problems(item, ITEM_KEYS[kind], f"an item of {what}")
        if kind == "text":
            if not isinstance(item.get("text"), str) or not item["text"]:
                yield Problem(f"empty text: {what} has a text item without text", "Leave the item out.")
            else:
                yield from control_problems(item["text"], f"the text of {what}")
                yield from _placeholder_problems(item["text"], what)
        elif kind == "image":
            shown += 1
            if role != "user":
                yield Problem(f"{what} is the {role}'s and holds an image", "Images belong to the user's turns.")
        elif role == "system":
            yield Problem(f"{what} is a system message and holds a region", "Regions belong to the dialogue.")
        else:
            yield from _region_item_problems(item, role, what, sizes, shown)
    if all(_type(item) == "text" and isinstance(item.get("text"), str) for item in content):
        joined = "".join(item["text"] for item in content)
        if joined and not joined.strip():
            yield Problem(f"empty text: {what} is blank", "Give it a text, or leave the turn out.")


def _placeholder_problems(text: str, what: str) -> Iterator[Problem]:
    for placeholder in PLACEHOLDERS:
        if placeholder in text:
            remedy = (
                "In messages, images and regions are items of their own; placeholders in the text are LLaVA's format."
            )
            yield Problem(f"the text of {what} holds '{placeholder}'", remedy)


def _region_item_problems(
    item: Mapping[str, Any], role: Any, what: str, sizes: Sequence[Size | None], shown: int
) -> Iterator[Problem]:
    kinds = [kind for kind in REGION_KINDS if kind in item]
    if len(kinds) != 1:
        names = ", ".join(map(repr, REGION_KINDS))
        yield Problem(f"a region of {what} has not exactly one of {names}", "Give one of them.")
        return
    number = item.get("image", shown - 1)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(sizes):
        where = f"image {number!r}" if "image" in item else "an image before it"
        remedy = 'Put the image before it, or let "image" be the number of one, counted from 0.'
        yield Problem(f"a region of {what} is on {where}, but the conversation has {len(sizes)} images", remedy)
        return
    (kind,) = kinds
    if kind == "box":
        yield from box_problems(item["box"], sizes[number], f"a box of {what}:")
    elif kind == "point":
        yield from point_problems(item["point"], sizes[number], f"a point of {what}:")
    else:
        yield from shape_problems(kind, item[kind], sizes[number], f"a {kind} of {what}")
    if kind != "box" and role == "assistant":
        yield Problem(f"{what} is the assistant's and holds a {kind}", "The assistant answers with boxes.")
    if "phrase" in item:
        yield from text_problems(item["phrase"], f"the phrase of a region of {what}")
