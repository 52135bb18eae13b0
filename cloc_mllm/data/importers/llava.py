"""LLaVA's JSON as published, by LLaVA and by ShareGPT4V: captions and instructions, and files made like them.

A sample is {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}; text-only samples have no "image"
(docs/Finetune_Custom_Data.md of https://github.com/haotian-liu/LLaVA). Known files, told by their names, whose page,
licence and number of samples go to `dataset.json`; where the number differs, a warning says so:

  blip_laion_cc_sbu_558k                                        558,128   captions
  llava_v1_5_mix665k                                            665,298   instructions; 40,688 of them text only
  sharegpt4v_instruct_gpt4-vision_cap100k                       102,025   captions
  share-captioner_coco_lcs_sam_1246k_1107                     1,246,901   captions
  sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k         665,058   instructions

The first two are at https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain and .../LLaVA-Instruct-150K, the others
at https://huggingface.co/datasets/Lin-Chen/ShareGPT4V. Names of pictures start, for the first, in what its images.zip
holds; for the others in the folder of `coco`, `gqa`, `ocr_vqa`, `textvqa` and `vg`, and of ShareGPT4V's `llava`, `sam`,
`share_textvqa`, `web-celebrity`, `web-landmark` and `wikiart`. The numbers are those that others have counted (LLaVA
issue 657; InternVL's list of its training data; users of ShareGPT4V, 118,287 of COCO + 558,128 of LLaVA + 570,486 of
SAM); the files were not at hand here.

`<image>` stands at the start or the end of a turn. A turn of the model before the first human one is left out, as
LLaVA's own training does; a human turn without an answer at the end teaches nothing and is left out. Both are counted,
as is the key "model", which is dropped.

Frame: mix665k's RefCOCO and Visual Genome samples have boxes in their text, `[0.31, 0.36, 0.5, 0.82]`: shares of the
picture PADDED to a square with its centre kept (LLaVA issues 606 and 822), rounded to two decimals. `--boxes text`
leaves them there as they are. `--boxes regions` makes region items of them, in pixels of the original image: in a
question a region that is shown, in an answer one to be found, its phrase taken from the question that describes it.
A side that rounding has left without length is widened to the width of that rounding, and what reaches into the padding
is clipped; both are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
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
from cloc_mllm.data.messages import from_llava, images_of, llava_problems
from cloc_mllm.data.schema import key_problems
from cloc_mllm.errors import ClocError

SUMMARY = "LLaVA's JSON: LLaVA-Pretrain 558k, mix665k, ShareGPT4V, and files like them"
EXAMPLE = "cloc-mllm data convert llava llava_v1_5_mix665k.json --images images --boxes regions --out data/mix665k"

BOX_MODES = ("text", "regions")
KEYS = frozenset({"id", "image", "conversations", "model", "width", "height"})
_FRAMES = {
    "text": "Boxes, if any, are in the texts as published: shares (0 to 1) of the picture padded to a square.",
    "regions": "Boxes were shares (0 to 1) of the picture padded to a square, rounded to 0.01; they are region items "
    "in pixels of the original image.",
}
_GPT4V = "CC BY-NC 4.0 and OpenAI's terms of use; pictures have licences of their own"
_HUB = "https://huggingface.co/datasets"
FILES: dict[str, tuple[str, str, int]] = {
    "blip_laion_cc_sbu_558k": (
        f"{_HUB}/liuhaotian/LLaVA-Pretrain",
        "captions of CC-3M and of BLIP under their terms; pictures have licences of their own",
        558_128,
    ),
    "llava_v1_5_mix665k": (
        f"{_HUB}/liuhaotian/LLaVA-Instruct-150K",
        "GPT-generated parts CC BY-NC 4.0 and OpenAI's terms, the others their sources'; pictures have their own",
        665_298,
    ),
    "sharegpt4v_instruct_gpt4-vision_cap100k": (f"{_HUB}/Lin-Chen/ShareGPT4V", _GPT4V, 102_025),
    "share-captioner_coco_lcs_sam_1246k_1107": (f"{_HUB}/Lin-Chen/ShareGPT4V", _GPT4V, 1_246_901),
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": (f"{_HUB}/Lin-Chen/ShareGPT4V", _GPT4V, 665_058),
}
"""Published files by their names without ending: page, licence, number of samples."""
_ORIGIN = Origin(
    "llava",
    "https://github.com/haotian-liu/LLaVA",
    "research use; GPT-generated parts CC BY-NC 4.0 and OpenAI's terms; pictures have licences of their own",
    "",
)
# With a decimal point each: a list of whole numbers in a text is no box.
_NUMBER = r"(?:0?\.\d+|1\.0+)"
_BOX = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_DESCRIBED = re.compile(r"region this sentence describes:\s*(\S.*)$", re.DOTALL)
"""How mix665k asks for a box; what follows is the phrase."""
_ROUNDING = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert llava`."""
    add_common_arguments(parser)
    parser.add_argument(
        "--boxes", default="text", choices=BOX_MODES, help="what becomes of boxes in texts (default: %(default)s)"
    )


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_llava(args.src, args.images, args.out, boxes=args.boxes, **common_options(args))


def convert_llava(
    src: str | Path, images: str | Path, out: str | Path, *, boxes: str = "text", **options: Any
) -> dict[str, Any]:
    """Converts LLaVA's JSON to messages; see the top of this file for what becomes of what.

    Args:
        src: The annotations.
        images: Folder that image names start from.
        out: Folder to write to.
        boxes: "text" leaves boxes in texts, "regions" makes region items of them.
        **options: See `convert_conversations`.

    Raises:
        ClocError: See `convert_conversations`.
    """
    if boxes not in BOX_MODES:
        raise ClocError(f"boxes is '{boxes}'", remedy=f"Write one of {', '.join(BOX_MODES)}.")
    origin = dataclasses.replace(_ORIGIN, frame=_FRAMES[boxes])
    if known := FILES.get(Path(src).stem):
        page, licence, samples = known
        origin = dataclasses.replace(origin, source=page, licence=licence, samples=samples)
    return convert_conversations(src, images, out, origin, partial(_messages, boxes=boxes), **options)


def _messages(raw: Mapping[str, Any], pictures: Pictures, counts: Counter[str], *, boxes: str) -> Messages:
    for problem in (*key_problems(raw, KEYS, "the sample"), *llava_problems(raw)):
        raise ClocError(problem.problem, remedy=problem.remedy)
    counts["model_key_dropped"] += "model" in raw
    messages = _from_human_to_model(from_llava(raw), counts)
    place = None
    for message in messages:
        for item in message["content"]:
            if item["type"] == "image":
                place = item["image"] = pictures.place(item["image"])
    found = sum(len(_BOX.findall(item["text"])) for m in messages for item in m["content"] if item["type"] == "text")
    if boxes == "text" or place is None or not found:
        counts["boxes_left_in_text"] += found
        return messages
    if len(images_of(raw)) > 1:
        raise ClocError("boxes in the text of a sample with several images: nothing says which they are on")
    size = pictures.size(place)
    asked = ""
    for message in messages:
        is_answer = message["role"] == "assistant"
        phrase = _DESCRIBED.search(asked) if is_answer else None
        asked = "".join(item.get("text", "") for item in message["content"])
        message["content"] = list(_with_regions(message["content"], size, phrase.group(1) if phrase else None, counts))
    return messages


def _from_human_to_model(messages: Messages, counts: Counter[str]) -> Messages:
    """Messages less the turns that neither ask nor answer anything; a system message stays."""
    start = next((k for k, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    end = len(messages) - (len(messages) > start and messages[-1]["role"] == "user")
    counts["leading_answers_left_out"] += start
    counts["trailing_questions_left_out"] += len(messages) - end
    return messages[start:end]


def _with_regions(
    content: list[dict[str, Any]], size: tuple[int, int], phrase: str | None, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Items in which every box that stood in a text is a region."""
    for item in content:
        if item["type"] != "text":
            yield item
            continue
        end = 0
        for box in _BOX.finditer(item["text"]):
            if box.start() > end:
                yield {"type": "text", "text": item["text"][end : box.start()]}
            region = {"type": "region", "box": from_padded_square([float(v) for v in box.groups()], size, counts)}
            yield region | ({} if phrase is None else {"phrase": phrase.strip().rstrip(".").rstrip()})
            end = box.end()
        if item["text"][end:]:
            yield {"type": "text", "text": item["text"][end:]}


def from_padded_square(box: list[float], size: tuple[int, int], counts: Counter[str]) -> list[float]:
    """A box in shares of the padded square, in pixels of the original image.

    Args:
        box: `[x1, y1, x2, y2]`, 0 to 1 of the square whose side is the picture's longer one and whose middle holds it.
        size: Width and height of the picture.
        counts: Boxes widened and clipped are counted here.
    """
    thin = [low for low in (0, 1) if box[low] == box[low + 2]]
    counts["boxes_widened"] += bool(thin)
    for low in thin:
        box[low], box[low + 2] = box[low] - _ROUNDING / 2, box[low + 2] + _ROUNDING / 2
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    pixels = [value * side - (left, top)[k % 2] for k, value in enumerate(box)]
    return clip_box(pixels, size, counts)
