"""Draws boxes with labels on a picture: for `chat --draw` and all reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette less its black: told apart by colour-blind readers too.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
TRUE_COLOUR = "#009E73"
PREDICTED_COLOUR = "#D55E00"
PROMPT_COLOUR = "#0072B2"
RIM_COLOUR, RIM = "#101418", 1
SMALLEST_SIDE = 480


@dataclass(frozen=True)
class DrawnBox:
    """A box to draw.

    Attributes:
        box: xyxy in pixels of the picture.
        label: Text beside it; may be empty.
        colour: CSS-style colour.
        dashed: Draw a dashed outline (what was given, against what was predicted).
    """

    box: Sequence[float]
    label: str = ""
    colour: str = PREDICTED_COLOUR
    dashed: bool = False


def draw_boxes(picture: Image.Image, boxes: Sequence[DrawnBox], smallest_side: int = SMALLEST_SIDE) -> Image.Image:
    """Draw boxes on a copy of a picture.

    Args:
        picture: Any mode; the copy is RGB.
        boxes: In pixels of `picture`.
        smallest_side: A smaller picture is enlarged by a whole factor first, so that labels can be read.

    Returns:
        The copy, enlarged by a whole factor if it was small.
    """
    factor = max(1, -(-smallest_side // max(picture.size)))
    canvas = picture.convert("RGB").resize(
        (picture.width * factor, picture.height * factor),
        Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS,
    )
    draw = ImageDraw.Draw(canvas)
    line = max(3, round(max(canvas.size) / 110))
    font = ImageFont.load_default(size=max(12, round(max(canvas.size) / 34)))
    for item in boxes:
        corners = _canvas_corners(item.box, factor, canvas.size)
        # A dark rim keeps an outline visible on an object of its own colour.
        for colour, width in ((RIM_COLOUR, line + 2 * RIM), (item.colour, line)):
            if item.dashed:
                _dashed_rectangle(draw, corners, colour, width, dash=4 * line)
            else:
                draw.line(_outline(corners), fill=colour, width=width, joint="curve")
        if item.label:
            _label(draw, item.label, corners, item.colour, font, canvas.size)
    return canvas


def _canvas_corners(box: Sequence[float], factor: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Scale a box to the canvas, keep it inside, and keep its corners in order."""
    x1, y1, x2, y2 = (value * factor for value in box)
    left, right = sorted((min(max(x1, 0), size[0] - 1), min(max(x2, 0), size[0] - 1)))
    top, bottom = sorted((min(max(y1, 0), size[1] - 1), min(max(y2, 0), size[1] - 1)))
    return left, top, right, bottom


def _outline(corners: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    left, top, right, bottom = corners
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top), (right, top)]


def _dashed_rectangle(
    draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], colour: str, line: int, dash: int
) -> None:
    left, top, right, bottom = corners
    for start in range(round(left), round(right), 2 * dash):
        stop = min(start + dash, right)
        draw.line((start, top, stop, top), fill=colour, width=line)
        draw.line((start, bottom, stop, bottom), fill=colour, width=line)
    for start in range(round(top), round(bottom), 2 * dash):
        stop = min(start + dash, bottom)
        draw.line((left, start, left, stop), fill=colour, width=line)
        draw.line((right, start, right, stop), fill=colour, width=line)


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    corners: tuple[float, float, float, float],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Write a label above the box, or inside it at the picture's top, on a plate of the box's colour."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 8, bottom - top + 6
    x = min(max(corners[0], 0), max(size[0] - width, 0))
    y = corners[1] - height if corners[1] >= height else corners[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 4 - left, y + 3 - top), text, fill=_ink(colour), font=font)


def _ink(colour: str) -> str:
    """Return black or white, whichever reads better on a `#RRGGBB` colour."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"
