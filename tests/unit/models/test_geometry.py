"""Coordinates to the model frame and back, by properties; and that boxes land on the pixels the tower is given."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from cloc_mllm.models.geometry import RESIZE_MODES, Geometry
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor, load_image

sides = st.integers(1, 5000)
sizes = st.sampled_from([32, 96, 224, 336])
modes = st.sampled_from(RESIZE_MODES)


@st.composite
def placed_boxes(draw: st.DrawFn) -> tuple[Geometry, Tensor]:
    """A geometry and ``(N, 4)`` boxes in pixels of its image, edges of the image among them."""
    geometry = Geometry.fit(draw(sides), draw(sides), draw(sizes), draw(modes))
    share = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
    corners = draw(st.lists(st.tuples(share, share, share, share), max_size=4))
    boxes = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4)
    ordered = torch.cat([boxes.reshape(-1, 2, 2).amin(1), boxes.reshape(-1, 2, 2).amax(1)], dim=1)
    return geometry, ordered * torch.tensor([geometry.width, geometry.height] * 2, dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(placed=placed_boxes())
def test_to_the_model_and_back_changes_nothing(placed: tuple[Geometry, Tensor]) -> None:
    geometry, boxes = placed
    in_model = geometry.boxes_to_model(boxes)
    assert in_model.dtype == torch.float32
    assert ((in_model >= 0) & (in_model <= 1)).all()
    assert (in_model[:, :2] <= in_model[:, 2:]).all()
    # Half a unit in the last place of fp32, in pixels of the longer side; a long thin image stretches it by 1.5.
    tolerance = 1e-7 * 1.5 * max(geometry.width, geometry.height)
    back = geometry.boxes_from_model(in_model)
    torch.testing.assert_close(back, boxes, rtol=0, atol=tolerance)
    limit = torch.tensor([geometry.width, geometry.height] * 2)
    assert ((back >= 0) & (back <= limit)).all()


@settings(max_examples=100, deadline=None)
@given(width=sides, height=sides, size=sizes, mode=modes)
def test_the_image_lies_inside_the_frame(width: int, height: int, size: int, mode: str) -> None:
    geometry = Geometry.fit(width, height, size, mode)
    x1, y1, x2, y2 = (geometry.boxes_to_model([[0, 0, width, height]])[0] * size).tolist()
    assert (x1, y1) == pytest.approx((geometry.left, geometry.top), abs=1e-4)
    assert (x2 - x1, y2 - y1) == pytest.approx((geometry.scaled_width, geometry.scaled_height), abs=1e-4)
    if mode != "pad":
        assert (geometry.scaled_width, geometry.scaled_height) == (size, size)
        return
    assert max(geometry.scaled_width, geometry.scaled_height) == size
    # The aspect is kept to the pixel, and the picture is centred to the pixel.
    longer = max(width, height)
    assert abs(geometry.scaled_width - width * size / longer) <= 1
    assert abs(geometry.scaled_height - height * size / longer) <= 1
    assert 0 <= size - geometry.scaled_width - 2 * geometry.left <= 1
    assert 0 <= size - geometry.scaled_height - 2 * geometry.top <= 1


@given(placed=placed_boxes())
def test_a_point_is_a_corner_of_a_box(placed: tuple[Geometry, Tensor]) -> None:
    geometry, boxes = placed
    assert geometry.points_to_model(boxes[:, :2]).equal(geometry.boxes_to_model(boxes)[:, :2])


def test_boxes_predicted_in_the_padding_are_clipped_to_the_image() -> None:
    geometry = Geometry.fit(200, 100, 100)
    everything = geometry.boxes_from_model(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.1]]))
    assert everything.tolist() == [[0, 0, 200, 100], [0, 0, 100, 0]]


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_a_fraction_of_a_pixel_of_a_large_image_survives(mode: str) -> None:
    geometry = Geometry.fit(4000, 3000, 336, mode)
    back = geometry.boxes_from_model(geometry.boxes_to_model([[1003.37, 7.25, 3999.5, 2999.75]]))
    torch.testing.assert_close(back, torch.tensor([[1003.37, 7.25, 3999.5, 2999.75]]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_any_leading_shape(mode: str, shape: tuple[int, ...]) -> None:
    geometry = Geometry.fit(64, 48, 32, mode)
    boxes = torch.rand(shape) * 48
    assert geometry.boxes_to_model(boxes).shape == shape
    assert geometry.boxes_from_model(geometry.boxes_to_model(boxes)).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_predictions_come_as_the_model_gives_them(dtype: torch.dtype) -> None:
    pred = torch.tensor([[0.25, 0.25, 0.5, 0.75]], dtype=dtype, requires_grad=True)
    back = Geometry.fit(200, 200, 96).boxes_from_model(pred)
    assert back.dtype == torch.float64
    assert not back.requires_grad
    assert back.tolist() == [[50, 50, 100, 150]]


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        Geometry.fit(0, 5, 32)
    with pytest.raises(ValueError, match="unknown resize mode 'crop'"):
        Geometry.fit(5, 5, 32, "crop")


# ---- the pixels ----------------------------------------------------------------------------------------------------


def drawn(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A black image with one white rectangle that covers the pixels from x1 to x2 - 1 and from y1 to y2 - 1."""
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill="white")
    return image


def bright_extent(pixels: Tensor) -> list[int]:
    """Bounding box of the pixels of ``(3, H, W)`` brighter than half, ends exclusive."""
    rows, columns = np.nonzero(pixels.mean(0).numpy() > 0.5)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), width=st.integers(20, 400), height=st.integers(20, 400), size=sizes, mode=modes)
def test_a_drawn_box_lands_on_the_processed_pixels(
    data: st.DataObject, width: int, height: int, size: int, mode: str
) -> None:
    processor = ClocImageProcessor(size=size, resize_mode=mode, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    geometry = processor.geometry(width, height)
    box = []
    for side, scaled in ((width, geometry.scaled_width), (height, geometry.scaled_height)):
        # At least three pixels wide before and after, so that resampling leaves a bright core with symmetric edges.
        extent = data.draw(st.integers(min(side, max(3, -(-3 * side // scaled))), side))
        start = data.draw(st.integers(0, side - extent))
        box.append((start, start + extent))
    (x1, x2), (y1, y2) = box
    pixels = processor(drawn(width, height, (x1, y1, x2, y2)))["pixel_values"][0]
    predicted = geometry.boxes_to_model([[x1, y1, x2, y2]])[0] * size
    # A pixel is bright if its centre is covered: the edge is known to half a pixel of the frame. On top of that, the
    # overshoot of bicubic resampling moves the half level by a few hundredths of a pixel of the original.
    tolerance = 0.55 + 0.06 * max(geometry.scaled_width / width, geometry.scaled_height / height)
    assert (predicted - torch.tensor(bright_extent(pixels))).abs().max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_refer_to_the_picture_as_viewers_show_it(orientation: int) -> None:
    """The file holds the picture turned or mirrored; its EXIF tag says how to undo that."""
    box = (30, 10, 70, 25)
    upright = drawn(120, 60, box)
    undone_by = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undone_by is None else upright.transpose(undone_by)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    image = load_image(buffer.getvalue())
    assert image.size == (120, 60)
    processor = ClocImageProcessor(size=96, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    pixels = processor(buffer.getvalue())["pixel_values"][0]
    predicted = processor.geometry(*image.size).boxes_to_model([box])[0] * 96
    assert (predicted - torch.tensor(bright_extent(pixels))).abs().max() <= 0.55


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_padding_is_the_mean_colour(size: tuple[int, int]) -> None:
    processor = ClocImageProcessor(size=96)
    pixels = processor(Image.new("RGB", size, "red"))["pixel_values"][0]
    geometry = processor.geometry(*size)
    outside = torch.ones(96, 96, dtype=torch.bool)
    outside[
        geometry.top : geometry.top + geometry.scaled_height, geometry.left : geometry.left + geometry.scaled_width
    ] = False
    assert outside.sum() == 96 * 48
    # Zero after normalising, to the rounding of a byte.
    assert pixels[:, outside].abs().max() < 0.5 / 255 / 0.26
    assert pixels[:, ~outside].abs().min() > 1
