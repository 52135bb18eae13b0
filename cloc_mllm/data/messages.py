"""Conversations of any accepted form, as messages.

LLaVA's JSON (`{"id", "image", "conversations": [{"from", "value"}], "regions": [[x1, y1, x2, y2], ...]}`, with
`<image>` and `<region>` in the texts) and the messages format differ only here; behind this file all is messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from cloc_mllm.data.schema import Problem, key_problems
from cloc_mllm.errors import ClocError

Message = dict[str, Any]
REGION = "<region>"

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"(<image>|<region>)")


def images_of(sample: Mapping[str, Any]) -> list[Any]:
    """The images a sample names outside its messages, in order: `image` (one or a list), or `images`."""
    images = sample.get("images", sample.get("image"))
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def llava_problems(sample: Mapping[str, Any]) -> Iterator[Problem]:
    """What keeps a sample in LLaVA's format from being converted."""
    turns = sample.get("conversations")
    if not isinstance(turns, (list, tuple)) or not turns:
        yield Problem("'conversations' is not a list of turns", 'A turn is {"from": "human", "value": "..."}.')
        return
    texts = []
    for k, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            yield Problem(f"turn {k} is not an object", 'A turn is {"from": "human", "value": "..."}.')
            continue
        yield from key_problems(turn, ("from", "value"), f"turn {k}")
        if not isinstance(turn.get("from"), str) or turn["from"] not in LLAVA_ROLES:
            yield Problem(f"turn {k} is from {turn.get('from')!r}", f"Write one of {', '.join(LLAVA_ROLES)}.")
        if not isinstance(turn.get("value"), str):
            yield Problem(f"turn {k} has no text", "Give it a text.")
        else:
            texts.append(turn["value"])
    joined = "".join(texts)
    regions = sample.get("regions")
    if regions is not None and not isinstance(regions, (list, tuple)):
        yield Problem("'regions' is not a list of boxes", "Write [[x1, y1, x2, y2], ...].")
        return
    for name, found, given in (
        ("<region>", joined.count("<region>"), len(regions or ())),
        ("<image>", joined.count("<image>"), len(images_of(sample))),
    ):
        if found != given:
            what = "box in 'regions'" if name == "<region>" else "entry in 'image'"
            problem = f"wrong number of {name}: the texts have {found}, the sample gives {given}"
            yield Problem(problem, f"Write one {name} for each {what}, in order.")


def from_llava(sample: Mapping[str, Any]) -> list[Message]:
    """Messages of a sample in LLaVA's format; call only when `llava_problems` finds nothing.

    Placeholders become items; the line break LLaVA writes beside `<image>` goes. A `<region>` in an answer becomes a
    box to be found.
    """
    images, regions = iter(images_of(sample)), iter(sample.get("regions") or ())
    messages: list[Message] = []
    for turn in sample["conversations"]:
        items: list[dict[str, Any]] = []
        for part in _PLACEHOLDER.split(turn["value"]):
            if part == "<image>":
                items.append({"type": "image", "image": next(images)})
            elif part == "<region>":
                items.append({"type": "region", "box": list(next(regions))})
            elif part:
                items.append({"type": "text", "text": part})
        messages.append({"role": LLAVA_ROLES[turn["from"]], "content": _without_image_breaks(items)})
    return messages


def _without_image_breaks(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for k, item in enumerate(items):
        if item["type"] != "text":
            continue
        if k and items[k - 1]["type"] == "image":
            item["text"] = item["text"].removeprefix("\n")
        if k + 1 < len(items) and items[k + 1]["type"] == "image":
            item["text"] = item["text"].removesuffix("\n")
    return [item for item in items if item["type"] != "text" or item["text"]]


def problems_before_messages(sample: Mapping[str, Any]) -> Iterator[Problem]:
    """What keeps `messages_of` from working on a sample: LLaVA's placeholders, or images that are not given."""
    if "conversations" in sample:
        yield from llava_problems(sample)
        return
    messages = sample.get("messages")
    slots = [item for item in _items(messages) if item.get("type") == "image"]
    open_slots = [item for item in slots if "image" not in item]
    given = images_of(sample)
    if given and not slots:
        yield Problem("the sample gives an image, but no message shows it", 'Add {"type": "image"} to a user turn.')
    # A sample may also name its picture outside the messages just for reference, when the messages name it as well.
    if open_slots and len(open_slots) != len(given):
        problem = f"{len(open_slots)} image items name no image, but the sample gives {len(given)}"
        yield Problem(problem, "Name the image in the item, or in the sample's 'image', in order.")


def messages_of(sample: Mapping[str, Any]) -> list[Message]:
    """The messages of a conversation in either format, every image item naming its image.

    The sample is left as it is; malformed messages come back as they are, for `schema.conversation_problems` to judge.
    """
    if "conversations" in sample:
        return from_llava(sample)
    messages = sample.get("messages")
    if not isinstance(messages, (list, tuple)):
        return []
    given = iter(images_of(sample))
    filled: list[Message] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            filled.append(message)
            continue
        items = [
            {**item, "image": next(given)}
            if isinstance(item, Mapping) and item.get("type") == "image" and "image" not in item
            else item
            for item in content
        ]
        filled.append({**message, "content": items})
    return filled


def _items(messages: Any) -> Iterator[Mapping[str, Any]]:
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for item in content if isinstance(content, (list, tuple)) else ():
            if isinstance(item, Mapping):
                yield item


def image_items(messages: Sequence[Message]) -> list[Any]:
    """The images that messages hold, in order."""
    return [item["image"] for item in _items(messages) if item.get("type") == "image" and "image" in item]


def turn_text(message: Message) -> str:
    """The words of a turn, with `<region>` where a region stands; images leave no trace."""
    shown = {"image": "", "region": "<region>"}
    content = message["content"]
    if isinstance(content, str):
        return content.strip()
    return "".join(shown.get(item["type"], item.get("text", "")) for item in content).strip()


def region_boxes(message: Message) -> list[Any]:
    """The boxes of a turn's regions, in order; regions given otherwise (points, masks) are left out."""
    return [item["box"] for item in _items([message]) if item.get("type") == "region" and "box" in item]


def with_mask_paths(messages: Any, folder: Path | None) -> Any:
    """A copy of messages in which the paths of masks start at `folder`, as those of images do.

    Malformed messages come back as they are, for `schema.conversation_problems` to judge.
    """
    if folder is None or not any(isinstance(item.get("mask"), str) for item in _items(messages)):
        return messages
    copies: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            copies.append(message)
            continue
        items = [
            {**item, "mask": str(folder / item["mask"])}
            if isinstance(item, Mapping) and isinstance(item.get("mask"), str)
            else item
            for item in content
        ]
        copies.append({**message, "content": items})
    return copies


def with_images(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """A copy of messages whose image items hold `images`, in order."""
    rest = iter(images)
    copies: list[Message] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**item, "image": next(rest)} if item["type"] == "image" else item for item in content]
        copies.append({**message, "content": content})
    return copies


# -- making messages --------------------------------------------------------------------------------------------------


def text_item(text: str) -> dict[str, Any]:
    """A text as an item of a message."""
    return {"type": "text", "text": text}


def turn(question: list[dict[str, Any]], answer: str | list[dict[str, Any]]) -> list[Message]:
    """A question and its answer, as two messages.

    Args:
        question: Items of the user's message.
        answer: Items of the assistant's, or its text.
    """
    said = [text_item(answer)] if isinstance(answer, str) else answer
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


def region_item(region: Any) -> dict[str, Any]:
    """A region as an item of a message.

    Args:
        region: ``[x1, y1, x2, y2]`` or ``[x, y]`` in pixels of the original image (a list, an array or a tensor); or an
            item, ``{"box": ...}``, ``{"point": ...}`` or any other kind that conversations know, which is passed on.

    >>> region_item([3, 4, 20, 25])
    {'type': 'region', 'box': [3, 4, 20, 25]}
    >>> region_item({"point": [5, 6]})
    {'type': 'region', 'point': [5, 6]}

    Raises:
        ClocError: It is none of these.
    """
    if isinstance(region, Mapping):
        return {"type": "region", **region}
    numbers = region.tolist() if hasattr(region, "tolist") else region
    if isinstance(numbers, (list, tuple)) and all(isinstance(value, Real) for value in numbers):
        if len(numbers) == 4:
            return {"type": "region", "box": list(numbers)}
        if len(numbers) == 2:
            return {"type": "region", "point": list(numbers)}
    raise ClocError(
        f"{region!r} is not a region",
        remedy="Give [x1, y1, x2, y2] or [x, y] in pixels of the original image, or an item of a message.",
    )


def is_region(value: Any) -> bool:
    """Whether something is one region rather than several."""
    if isinstance(value, Mapping):
        return True
    if hasattr(value, "ndim"):
        return bool(value.ndim == 1)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Real) for v in value)


def question_items(question: str, regions: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """A question and the regions it is about, as items of a message.

    Args:
        question: With one ``<region>`` where each region belongs; without any, they are put after it.
        regions: As :func:`region_item` takes them.

    >>> question_items("What is <region>?", [[3, 4, 20, 25]])[1]
    {'type': 'region', 'box': [3, 4, 20, 25]}

    Raises:
        ClocError: Nothing is asked, or the question has another number of ``<region>``.
    """
    if not isinstance(question, str) or not question.strip():
        raise ClocError("there is no question")
    found = question.count(REGION)
    if found not in (0, len(regions)):
        raise ClocError(
            f"wrong number of {REGION}: the question holds {found}, {len(regions)} regions are given",
            remedy=f"Give one region for each {REGION}, in order.",
        )
    if regions and not found:
        question = f"{question.strip()} {' and '.join([REGION] * len(regions))}"
    items: list[dict[str, Any]] = []
    for number, part in enumerate(question.split(REGION)):
        if number:
            items.append(region_item(regions[number - 1]))
        if part:
            items.append({"type": "text", "text": part})
    return items
