"""One PNG of a demo's result, for a README: boxes that were found, and the headline figures as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from cloc_mllm.apps.demo.findings import percent
from cloc_mllm.models.image_processing_cloc import load_image
from cloc_mllm.pages.drawing import PALETTE, TRUE_COLOUR, DrawnBox, draw_boxes

TILE, GAP, MARGIN = 216, 14, 24
COLUMNS, ROWS = 4, 2
BAR_HEIGHT, BAR_GAP, LABEL_WIDTH = 15, 4, 330
INK, SOFT, PAGE = "#1d2329", "#5b6670", "#ffffff"
MODEL_COLOURS = {
    "clip": PALETTE[1],
    "cloc": PALETTE[0],
    "cloc_prompter": PALETTE[0],
    "clip_captions": PALETTE[3],
    "clip_roi": PALETTE[3],
    "cloc_new_head": PALETTE[4],
    "blind": PALETTE[5],
}
FIGURES = (
    ("encoder", "region_top1", "name a region"),
    ("encoder", "grounding_zeroshot_acc50", "find a phrase, not trained for it"),
    ("encoder", "image_t2i_r1", "find the image of a caption"),
    ("mllm", "referring_acc", "MLLM: say what is in a box"),
    ("mllm", "grounding_acc50", "MLLM: find a phrase"),
)


def write_picture(report: Mapping[str, Any], out: Path, images: Path) -> Path:
    """Write `report.png` beside the report.

    Args:
        report: The demo's report.
        out: The demo's output folder.
        images: The folder that the samples' image paths are relative to.

    Returns:
        The path of the picture.
    """
    samples = [sample for sample in report["samples"] if sample["task"] == "grounding"][: COLUMNS * ROWS]
    groups = [
        (label, {name: entry["metrics"][metric] for name, entry in report[kind].items() if _has(entry, metric)})
        for kind, metric, label in FIGURES
    ]
    groups = [(label, values) for label, values in groups if values]
    bars_height = sum(len(values) * (BAR_HEIGHT + BAR_GAP) + GAP for _, values in groups)
    rows = -(-len(samples) // COLUMNS)
    tiles_height = rows * (TILE + 40 + GAP)
    width = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
    canvas = Image.new("RGB", (width, 2 * MARGIN + 34 + tiles_height + bars_height), PAGE)
    draw = ImageDraw.Draw(canvas)
    models = list(samples[0]["answers"]) if samples else []
    _legend(draw, (MARGIN, MARGIN), models)
    for number, sample in enumerate(samples):
        x = MARGIN + number % COLUMNS * (TILE + GAP)
        y = MARGIN + 34 + number // COLUMNS * (TILE + 40 + GAP)
        canvas.paste(_tile(sample, images), (x, y))
        draw.text((x, y + TILE + 4), sample["question"], fill=INK, font=_font(13))
        draw.text((x, y + TILE + 21), _overlaps(sample), fill=SOFT, font=_font(11))
    _bars(draw, groups, MARGIN + 34 + tiles_height, width)
    path = out / "report.png"
    canvas.save(path, optimize=True)
    return path


def _has(entry: Mapping[str, Any], metric: str) -> bool:
    return bool(entry["metrics"].get(metric)) and entry["metrics"][metric]["value"] is not None


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _tile(sample: Mapping[str, Any], images: Path) -> Image.Image:
    """Return a grounding sample's picture with the true box dashed and each model's box in its colour."""
    boxes = [DrawnBox(sample["box"], colour=TRUE_COLOUR, dashed=True)]
    for name, answer in sample["answers"].items():
        colour = MODEL_COLOURS.get(name, PALETTE[6])
        boxes += [DrawnBox(item["box"], colour=colour) for item in answer["boxes"]]
    return draw_boxes(load_image(images / sample["image"]), boxes, smallest_side=TILE).resize(
        (TILE, TILE), Image.Resampling.LANCZOS
    )


def _overlaps(sample: Mapping[str, Any]) -> str:
    notes = [
        f"{name} {answer['iou']:.2f}" if answer["boxes"] else f"{name} none"
        for name, answer in sample["answers"].items()
    ]
    return "IoU: " + ", ".join(notes)


def _legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], models: Sequence[str]) -> None:
    x, y = corner
    colours = {"true box (dashed)": TRUE_COLOUR} | {name: MODEL_COLOURS.get(name, PALETTE[6]) for name in models}
    for name, colour in colours.items():
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=colour)
        draw.text((x + 18, y), name, fill=INK, font=_font(14))
        x += 40 + round(draw.textlength(name, font=_font(14)))


def _bars(
    draw: ImageDraw.ImageDraw, groups: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], top: int, width: int
) -> None:
    """Draw a group of bars for each figure, one bar a model, from 0 to 100 %, with its interval."""
    left, right, y = MARGIN + LABEL_WIDTH, width - MARGIN - 70, top
    for label, values in groups:
        draw.text((MARGIN, y), label, fill=INK, font=_font(13))
        for name, entry in values.items():
            end, low, high = (left + (right - left) * share for share in (entry["value"], *entry["ci95"]))
            draw.text((left - 8, y), name, fill=SOFT, font=_font(12), anchor="ra")
            draw.rectangle((left, y, right, y + BAR_HEIGHT), fill="#eef1f3")
            draw.rectangle((left, y, end, y + BAR_HEIGHT), fill=MODEL_COLOURS.get(name, PALETTE[6]))
            draw.line((low, y + BAR_HEIGHT / 2, high, y + BAR_HEIGHT / 2), fill=INK, width=2)
            draw.text((right + 8, y), percent(entry["value"]), fill=INK, font=_font(12))
            y += BAR_HEIGHT + BAR_GAP
        y += GAP
