"""Ferret's training JSON (GRIT, Ferret-UI): conversations whose boxes stand in a nested list, one list a turn.

Source: https://github.com/apple/ml-ferret (ferret/train/train.py reads it; samples in ferretui/playground/sample_data).
Licence: the data is CC BY-NC 4.0; pictures have licences of their own.

A sample is {"id", "image", "image_w", "image_h", "conversations": [{"from": "human" | "gpt", "value"}],
"box_x1y1x2y2": [[[x1, y1, x2, y2], ...], ...]}: box k of turn t stands where `<bbox_locationk>` is in turn t. Samples
without "box_x1y1x2y2" are plain LLaVA ones. A box in a human turn becomes a region that is shown, one in an answer a
region to be found. "masks" has, in the same lists, a run-length code {"size": [height, width], "counts"} for each box:
Ferret restricts a region's features to it, so with `--shape mask`, the default, what is shown is the mask; with
`--shape box` masks are left out, counted, as those of answers are either way (answers are boxes), and as is "model".
The keys "dataset" and "location_instruction", by which Ferret's own loader marks samples, are not needed.

Frame: pixels of the original image, `image_w` x `image_h`, which must be the picture's. Boxes that reach beyond it are
clipped and counted, as Ferret does.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
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
SHAPES = ("mask", "box")
_BOXES = "box_x1y1x2y2"
_MARKS = ("dataset", "location_instruction")
KEYS = frozenset({"id", "image", "image_w", "image_h", "conversations", _BOXES, "masks", "model", *_MARKS})
_LOCATION = re.compile(r"<bbox_location(\d+)>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert ferret`."""
    add_common_arguments(parser)
    parser.add_argument(
        "--shape", default="mask", choices=SHAPES, help="how regions with a mask are shown (default: %(default)s)"
    )


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_ferret(args.src, args.images, args.out, shape=args.shape, **common_options(args))


def convert_ferret(
    src: str | Path, images: str | Path, out: str | Path, *, shape: str = "mask", **options: Any
) -> dict[str, Any]:
    """Converts Ferret's JSON to messages.

    Args:
        src: The annotations.
        images: Folder that image names start from.
        out: Folder to write to.
        shape: How a region of a question that has a mask is shown: "mask" or "box".
        **options: See `convert_conversations`.

    Raises:
        ClocError: See `convert_conversations`.
    """
    if shape not in SHAPES:
        raise ClocError(f"shape is '{shape}'", remedy=f"Write one of {', '.join(SHAPES)}.")
    return convert_conversations(src, images, out, ORIGIN, partial(_messages, shape=shape), **options)


def _messages(raw: Mapping[str, Any], pictures: Pictures, counts: Counter[str], *, shape: str) -> Messages:
    for problem in (*key_problems(raw, KEYS, "the sample"), *llava_problems(raw)):
        raise ClocError(problem.problem, remedy=problem.remedy)
    if raw.get("image") is None or isinstance(raw["image"], list):
        raise ClocError("the sample does not name one image", remedy="Ferret's samples have one each.")
    place = pictures.place(raw["image"])
    size = pictures.size(place)
    _check_size(raw, size)
    counts["model_key_dropped"] += "model" in raw
    messages = from_llava(raw)
    boxes, masks = _of_turns(raw, _BOXES, len(messages)), _of_turns(raw, "masks", len(messages))
    for number, (message, of_turn, masks_of_turn) in enumerate(zip(messages, boxes, masks, strict=True)):
        if masks_of_turn and len(masks_of_turn) != len(of_turn):
            raise ClocError(f"turn {number} has {len(masks_of_turn)} masks, but {len(of_turn)} boxes")
        shown_as_masks = shape == "mask" and message["role"] == "user"
        regions = [
            {"mask": mask} if mask is not None and shown_as_masks else {"box": clip_box(box, size, counts)}
            for box, mask in zip(of_turn, masks_of_turn or [None] * len(of_turn), strict=True)
        ]
        carried = sum("mask" in region for region in regions)
        counts["masks_carried"] += carried
        counts["masks_left_out"] += sum(mask is not None for mask in masks_of_turn) - carried
        message["content"] = _with_regions(message["content"], regions, number)
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


def _of_turns(raw: Mapping[str, Any], key: str, turns: int) -> list[list[Any]]:
    """The boxes or masks of each turn; Ferret leaves out empty lists at the end."""
    found = raw.get(key) or []
    if not isinstance(found, list) or not all(isinstance(of_turn, list) for of_turn in found):
        raise ClocError(f"'{key}' is not a list with a list for each turn")
    if len(found) > turns:
        raise ClocError(f"'{key}' has lists for {len(found)} turns, but the conversation has {turns}")
    return found + [[]] * (turns - len(found))


def _with_regions(content: list[dict[str, Any]], boxes: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
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
                items.append({"type": "region", **boxes[int(piece)]})
    if unused := sorted(set(range(len(boxes))) - used):
        raise ClocError(f"box {unused[0]} of turn {number} stands nowhere in its text")
    return items
