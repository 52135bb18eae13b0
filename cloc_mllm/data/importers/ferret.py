"""Ferret's training JSON (GRIT, Ferret-UI): conversations whose boxes stand in a nested list, one list a turn.

Source: https://github.com/apple/ml-ferret (ferret/train/train.py reads it; samples in ferretui/playground/sample_data).
Licence: the data is CC BY-NC 4.0; pictures have licences of their own.

A sample is {"id", "image", "image_w", "image_h", "conversations": [{"from": "human" | "gpt", "value"}],
"box_x1y1x2y2": [[[x1, y1, x2, y2], ...], ...]}: box k of turn t stands where `<bbox_locationk>` is in turn t. Samples
without "box_x1y1x2y2" are plain LLaVA ones. A box in a human turn becomes a region that is shown, one in an answer a
region to be found. Ferret draws points from "masks" in training; here they are left out and counted, as is "model". The
keys "dataset" and "location_instruction", by which Ferret's own loader marks samples, are not needed.

Frame: pixels of the original image, `image_w` x `image_h`, which must be the picture's. Boxes that reach beyond it are
clipped and counted, as Ferret does.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping
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
from cloc_mllm.data.messages import from_llava, llava_problems
from cloc_mllm.data.schema import key_problems
from cloc_mllm.errors import ClocError

SUMMARY = "Ferret's JSON (GRIT, Ferret-UI): boxes in a list for each turn"
EXAMPLE = "cloc-mllm data convert ferret refexp.json --images images --out data/refexp"

ORIGIN = Origin(
    "ferret",
    "https://github.com/apple/ml-ferret",
    "CC BY-NC 4.0; pictures have licences of their own",
    "Boxes are in pixels of the original image, as in the source.",
)
_BOXES = "box_x1y1x2y2"
_MARKS = ("dataset", "location_instruction")
KEYS = frozenset({"id", "image", "image_w", "image_h", "conversations", _BOXES, "masks", "model", *_MARKS})
_LOCATION = re.compile(r"<bbox_location(\d+)>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert ferret`."""
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_ferret(args.src, args.images, args.out, **common_options(args))


def convert_ferret(src: str | Path, images: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Converts Ferret's JSON to messages; arguments and errors are those of `convert_conversations`."""
    return convert_conversations(src, images, out, ORIGIN, _messages, **options)


def _messages(raw: Mapping[str, Any], pictures: Pictures, counts: Counter[str]) -> Messages:
    for problem in (*key_problems(raw, KEYS, "the sample"), *llava_problems(raw)):
        raise ClocError(problem.problem, remedy=problem.remedy)
    if raw.get("image") is None or isinstance(raw["image"], list):
        raise ClocError("the sample does not name one image", remedy="Ferret's samples have one each.")
    place = pictures.place(raw["image"])
    size = pictures.size(place)
    _check_size(raw, size)
    counts["masks_left_out"] += "masks" in raw
    counts["model_key_dropped"] += "model" in raw
    messages = from_llava(raw)
    boxes = _boxes_of_turns(raw, len(messages))
    for number, (message, of_turn) in enumerate(zip(messages, boxes, strict=True)):
        clipped = [clip_box(box, size, counts) for box in of_turn]
        message["content"] = _with_regions(message["content"], clipped, number)
        for item in message["content"]:
            if item["type"] == "image":
                item["image"] = place
    return messages


def _check_size(raw: Mapping[str, Any], size: tuple[int, int]) -> None:
    stated = (raw.get("image_w"), raw.get("image_h"))
    if stated == (None, None) and _BOXES not in raw:
        return
    if stated != size:
        raise ClocError(
            f"image_w and image_h say {stated[0]} x {stated[1]} pixels, but the picture has {size[0]} x {size[1]}",
            remedy="The boxes would be wrong: use the pictures that they were made for.",
        )


def _boxes_of_turns(raw: Mapping[str, Any], turns: int) -> list[list[Any]]:
    """The boxes of each turn; Ferret leaves out empty lists at the end."""
    boxes = raw.get(_BOXES, [])
    if not isinstance(boxes, list) or not all(isinstance(of_turn, list) for of_turn in boxes):
        raise ClocError(f"'{_BOXES}' is not a list with a list of boxes for each turn")
    if len(boxes) > turns:
        raise ClocError(f"'{_BOXES}' has lists for {len(boxes)} turns, but the conversation has {turns}")
    return boxes + [[]] * (turns - len(boxes))


def _with_regions(content: list[dict[str, Any]], boxes: list[Any], number: int) -> list[dict[str, Any]]:
    """A turn's items in which every location is a region.

    Raises:
        ClocError: A location has no box, or a box no location.
    """
    items: list[dict[str, Any]] = []
    used: set[int] = set()
    for item in content:
        if item["type"] != "text":
            items.append(item)
            continue
        # Split at the placeholders, whose numbers come out in the odd places.
        for k, piece in enumerate(_LOCATION.split(item["text"])):
            if k % 2 == 0:
                items += [{"type": "text", "text": piece}] if piece else []
            elif int(piece) >= len(boxes):
                raise ClocError(f"turn {number} has <bbox_location{piece}>, but {len(boxes)} boxes")
            else:
                used.add(int(piece))
                items.append({"type": "region", "box": boxes[int(piece)]})
    if unused := sorted(set(range(len(boxes))) - used):
        raise ClocError(f"box {unused[0]} of turn {number} stands nowhere in its text")
    return items
