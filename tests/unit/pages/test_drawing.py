"""Boxes are drawn where they are, in their colour, on pictures of any size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cloc_mllm.pages.drawing import DrawnBox, draw_boxes


def _colour_bounds(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize("dashed", [False, True])
@pytest.mark.parametrize("side", [60, 96, 500])
def test_the_outline_lies_on_the_box(side: int, dashed: bool) -> None:
    box = (0.2 * side, 0.3 * side, 0.7 * side, 0.8 * side)
    drawn = draw_boxes(Image.new("RGB", (side, side)), [DrawnBox(box, colour="#FF0000", dashed=dashed)])
    factor = drawn.width / side
    assert factor == int(factor)
    found = _colour_bounds(drawn, (255, 0, 0))
    tolerance = 4 * max(3, round(drawn.width / 110)) if dashed else max(3, round(drawn.width / 110))
    assert found == pytest.approx([value * factor for value in box], abs=tolerance)


def test_the_picture_given_is_not_touched() -> None:
    picture = Image.new("L", (500, 400), 7)
    drawn = draw_boxes(picture, [DrawnBox((10, 10, 90, 90), "a label")])
    assert drawn.mode == "RGB"
    assert drawn.size == (500, 400)
    assert np.asarray(picture).max() == 7


@pytest.mark.parametrize("box", [(-50, -50, 900, 900), (90, 90, 10, 10), (499, 399, 520, 420), (0, 0, 0, 0)])
def test_any_box_can_be_drawn(box: tuple[int, int, int, int]) -> None:
    """A model's box may be degenerate or outside; a picture of it must still come out."""
    drawn = draw_boxes(Image.new("RGB", (500, 400)), [DrawnBox(box, "label"), DrawnBox(box, dashed=True)])
    assert drawn.size == (500, 400)
