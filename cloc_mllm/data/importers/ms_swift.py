"""ms-swift's standard format for grounding: messages with `<image>`, `<ref-object>` and `<bbox>`, objects beside them.

Source: https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html. Licence: a format, not a data set.

A sample is {"messages": [{"role", "content": text}], "images": [path, ...], "objects": {"ref": [text, ...],
"bbox": [[x1, y1, x2, y2] or [x, y], ...], "bbox_type": "real" | "norm1", "image_id": [k, ...]}}. Placeholders are
filled in order: `<image>` from "images", `<ref-object>` from "ref", `<bbox>` from "bbox". A box of a user's turn is a
region that is shown (a pair of numbers a point), one in an answer a region to be found; its phrase is the reference
right before it, or, where an answer has said nothing yet, the last reference made.

Frame: "real" (the default) is pixels of the original image, "norm1" shares (0 to 1) of its width and height. Both come
out in pixels. "image_id" says which image each box is on, default the first.

Text-only samples are kept. What has no place here (tools, videos, audios, rejected responses, turns of tools) makes
a bad sample of it rather than being left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.conversations import (
    Messages,
    Origin,
    add_common_arguments,
    clip_box,
    common_options,
    convert_conversations,
)
from cloc_mllm.data.importers.pictures import Pictures
from cloc_mllm.data.messages import Message, images_of
from cloc_mllm.data.schema import MESSAGE_KEYS, key_problems
from cloc_mllm.errors import ClocError

SUMMARY = "ms-swift's messages with <ref-object> and <bbox>, objects beside them"
EXAMPLE = "cloc-mllm data convert ms-swift grounding.jsonl --images images --out data/grounding"

ORIGIN = Origin(
    "ms-swift",
    "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html",
    "the data's own",
    "Boxes were pixels of the original image (bbox_type real) or shares of its sides (norm1); they are pixels.",
)
KEYS = frozenset({"id", "messages", "images", "image", "objects"})
OBJECT_KEYS = frozenset({"ref", "bbox", "bbox_type", "image_id"})
BOX_TYPES = ("real", "norm1")
_PLACEHOLDER = re.compile(r"(<image>|<ref-object>|<bbox>)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert ms-swift`."""
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_ms_swift(args.src, args.images, args.out, **common_options(args))


def convert_ms_swift(src: str | Path, images: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Converts ms-swift's format to messages; arguments and errors are those of `convert_conversations`."""
    return convert_conversations(src, images, out, ORIGIN, _messages, **options)


def _messages(raw: Mapping[str, Any], pictures: Pictures, counts: Counter[str]) -> Messages:
    for problem in key_problems(raw, KEYS, "the sample"):
        raise ClocError(problem.problem, remedy=problem.remedy)
    turns = raw.get("messages")
    if not isinstance(turns, list) or not turns:
        raise ClocError("'messages' is not a list of turns")
    places = [pictures.place(image) for image in images_of(raw)]
    filler = _Filler(places, _objects(raw.get("objects"), places, pictures, counts))
    messages = [filler.fill(turn, number) for number, turn in enumerate(turns)]
    filler.finish()
    return messages


def _objects(
    objects: Any, places: list[Path | bytes], pictures: Pictures, counts: Counter[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """References, and a region item in pixels for each box."""
    objects = json.loads(objects) if isinstance(objects, str) and objects.lstrip().startswith("{") else objects or {}
    if not isinstance(objects, Mapping):
        raise ClocError("'objects' is not an object")
    for problem in key_problems(objects, OBJECT_KEYS, "'objects'"):
        raise ClocError(problem.problem, remedy=problem.remedy)
    kind = objects.get("bbox_type") or "real"
    if kind not in BOX_TYPES:
        raise ClocError(f"bbox_type is '{kind}'", remedy=f"Known are {', '.join(BOX_TYPES)}.")
    boxes = objects.get("bbox") or []
    numbers = objects.get("image_id") or [0] * len(boxes)
    if not isinstance(numbers, list) or len(numbers) != len(boxes):
        raise ClocError(f"{len(boxes)} boxes, but 'image_id' is {numbers!r}", remedy="Give one number for each box.")
    regions = []
    for box, number in zip(boxes, numbers, strict=True):
        if not isinstance(number, int) or not 0 <= number < len(places):
            raise ClocError(f"a box is on image {number!r}, but the sample has {len(places)} images")
        region = _region(box, pictures.size(places[number]), kind == "norm1", counts)
        regions.append(region | ({"image": number} if len(places) > 1 else {}))
    return list(objects.get("ref") or []), regions


def _region(box: Any, size: tuple[int, int], is_share: bool, counts: Counter[str]) -> dict[str, Any]:
    if not isinstance(box, list) or len(box) not in (2, 4) or not all(isinstance(v, (int, float)) for v in box):
        raise ClocError(f"{box!r} is neither a box of 4 numbers nor a point of 2")
    if is_share:
        if any(not 0 <= value <= 1 for value in box):
            raise ClocError(f"bbox_type is 'norm1', but {box} goes beyond 0 to 1")
        box = [value * size[k % 2] for k, value in enumerate(box)]
    if len(box) == 2:
        return {"type": "region", "point": [round(float(value), 3) for value in box]}
    return {"type": "region", "box": clip_box(box, size, counts)}


class _Filler:
    """Puts images, references and boxes where their placeholders are, in the order of the conversation."""

    def __init__(self, places: list[Path | bytes], objects: tuple[list[str], list[dict[str, Any]]]) -> None:
        self._rest: dict[str, Iterator[Any]] = {
            "<image>": iter(places),
            "<ref-object>": iter(objects[0]),
            "<bbox>": iter(objects[1]),
        }
        self._last_reference: str | None = None

    def fill(self, turn: Any, number: int) -> Message:
        """One turn as a message.

        Raises:
            ClocError: It is malformed, or a placeholder has nothing left to stand for.
        """
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise ClocError(f"message {number} has no text")
        for problem in key_problems(turn, MESSAGE_KEYS, f"message {number}"):
            raise ClocError(problem.problem, remedy=problem.remedy)
        is_answer = turn.get("role") == "assistant"
        items: list[dict[str, Any]] = []
        referred = False  # whether what stands right before is a reference, or boxes that follow one
        for piece in _PLACEHOLDER.split(turn["content"]):
            if piece == "<image>":
                items.append({"type": "image", "image": self._next(piece, number)})
            elif piece == "<bbox>":
                region = dict(self._next(piece, number))
                silent = not any(item["type"] == "text" and item["text"].strip() for item in items)
                if is_answer and self._last_reference and (referred or silent):
                    region["phrase"] = self._last_reference
                items.append(region)
            elif piece == "<ref-object>":
                self._last_reference = str(self._next(piece, number))
                _add_text(items, self._last_reference)
            else:
                _add_text(items, piece)
            referred = piece == "<ref-object>" or (referred and (piece == "<bbox>" or not piece.strip()))
        return {"role": turn.get("role"), "content": items}

    def _next(self, placeholder: str, number: int) -> Any:
        found = next(self._rest[placeholder], None)
        if found is None:
            raise ClocError(f"message {number} has a {placeholder} for which nothing is left")
        return found

    def finish(self) -> None:
        """Refuse what has stood nowhere."""
        for placeholder, rest in self._rest.items():
            if next(rest, None) is not None:
                raise ClocError(f"there are more entries than {placeholder} in the messages", remedy="Remove one.")


def _add_text(items: list[dict[str, Any]], text: str) -> None:
    if text and items and items[-1]["type"] == "text":
        items[-1]["text"] += text
    elif text:
        items.append({"type": "text", "text": text})
