"""Masks in every form they are written in, held against COCO's own reader; scribbles; points that stand for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from cloc_mllm.data.schema import REGION_KINDS
from cloc_mllm.models.region_shapes import (
    SHAPE_KINDS,
    SHAPE_POINTS,
    decode_rle,
    mask_shape,
    read_mask,
    scribble_shape,
    spread_points,
)

masks = arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))).filter(np.any)


def runs(mask: np.ndarray) -> list[int]:
    """The uncompressed code, counted pixel by pixel."""
    counts, value = [0], False
    for pixel in mask.T.reshape(-1):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@given(masks)
@settings(max_examples=150, deadline=None)
def test_run_length_codes_are_read_as_coco_reads_them(mask: np.ndarray) -> None:
    height, width = mask.shape
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    for rle in (
        theirs,
        {**theirs, "counts": theirs["counts"].decode()},
        {"size": [height, width], "counts": runs(mask)},
    ):
        assert np.array_equal(read_mask(rle, width, height), mask)
    again = coco.frPyObjects({"size": [height, width], "counts": runs(mask)}, height, width)
    assert np.array_equal(coco.decode(again).astype(bool), decode_rle(again))


def test_long_runs_and_their_differences_are_read() -> None:
    mask = np.zeros((700, 900), dtype=bool)
    mask[100:600, 50:800:3] = True
    mask[5, 7] = True
    assert np.array_equal(decode_rle(coco.encode(np.asfortranarray(mask.astype(np.uint8)))), mask)


@given(masks)
@settings(max_examples=60, deadline=None)
def test_every_form_of_a_mask_is_the_same_mask(mask: np.ndarray) -> None:
    height, width = mask.shape
    for form in (mask, mask.astype(np.uint8) * 255, Image.fromarray(mask), Image.fromarray(mask.astype(np.uint8))):
        assert np.array_equal(read_mask(form, width, height), mask)
    shape = mask_shape(mask, width, height)
    rows, columns = mask.nonzero()
    assert shape.box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert 1 <= len(shape.points) == min(SHAPE_POINTS, mask.sum())
    assert len(np.unique(shape.points, axis=0)) == len(shape.points)
    assert all(mask[int(y), int(x)] for x, y in shape.points)
    assert np.array_equal(mask_shape(mask, width, height).points, shape.points)


def test_a_mask_from_a_file(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.3
    Image.fromarray(mask).save(tmp_path / "m.png")
    for path in (tmp_path / "m.png", str(tmp_path / "m.png")):
        assert np.array_equal(read_mask(path, 40, 30), mask)


corner = st.tuples(st.floats(0, 40, width=32), st.floats(0, 30, width=32))


@given(st.lists(corner, min_size=3, max_size=7))
@settings(max_examples=100, deadline=None)
def test_a_polygon_holds_the_pixels_whose_centres_lie_in_it(corners: list[tuple[float, float]]) -> None:
    polygon = [value for point in corners for value in point]
    xs, ys = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    inside = np.zeros((30, 40), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        spans = (y1 <= ys) != (y2 <= ys)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = x1 + (ys - y1) / (np.float64(y2) - y1) * (np.float64(x2) - x1)
        inside ^= spans & (xs >= crossing)
    if inside.any():
        assert np.array_equal(read_mask([polygon], 40, 30), inside)
    else:
        with pytest.raises(ValueError, match="the mask is empty"):
            read_mask([polygon], 40, 30)


def test_polygons_are_filled_nearly_as_coco_fills_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.random(8)) * 2 * np.pi
        radius = 20 + 30 * rng.random(8)
        outline = np.stack([60 + radius * np.cos(angles), 55 + radius * np.sin(angles)], axis=1)
        polygons = [outline.ravel().tolist(), [2, 2, 20, 2, 20, 15, 2, 15]]
        theirs = coco.decode(coco.merge(coco.frPyObjects(polygons, 110, 120))).astype(bool)
        ours = read_mask(polygons, 120, 110)
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97  # COCO's have a rim of half pixels


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (np.ones((30, 41), dtype=bool), "mask is 41 x 30 pixels, but its image is 40 x 30"),
        (np.ones((40, 30), dtype=bool), "mask is 30 x 40 pixels, but its image is 40 x 30"),
        (np.zeros((30, 40), dtype=bool), "the mask is empty"),
        (np.ones((30, 40)), "array of bool or uint8"),
        (np.ones((30, 40, 3), dtype=np.uint8), "array of bool or uint8"),
        (Image.new("RGB", (40, 30), "white"), "mode 'RGB'"),
        (Image.new("P", (40, 30), 1), "several labels"),
        ("missing.png", "mask 'missing.png' does not exist"),
        (__file__, "cannot be read as a picture"),
        ({"size": [30, 40]}, "a run-length code is"),
        ({"size": [30], "counts": [1200]}, "a run-length code is"),
        ({"size": [30, 40], "counts": [0, 1200], "area": 3}, "a run-length code is"),
        ({"size": [30, 40], "counts": 7}, "a run-length code is"),
        ({"size": [10**9, 10**9], "counts": [0, 10**18]}, "1000000000 x 1000000000 pixels, but its image is 40 x 30"),
        ({"size": [30, 40], "counts": [10**30, 5]}, "runs of the mask hold 1"),
        ({"size": [30, 40], "counts": [0, 1199]}, "runs of the mask hold 1199 pixels, but its size is 40 x 30"),
        ({"size": [30, 40], "counts": [0, 1300, -100]}, "not all whole numbers"),
        ({"size": [30, 40], "counts": [0, 1200.0]}, "not all whole numbers"),
        ({"size": [30, 40], "counts": [1200]}, "the mask is empty"),
        ({"size": [30, 40], "counts": "0é"}, "letters that are none of its own"),
        ({"size": [30, 40], "counts": "0\n"}, "letters that are none of its own"),
        ({"size": [30, 40], "counts": "P"}, "cut off"),
        ({"size": [30, 40], "counts": "PPPPPPPPPPPPPPPPPPPP1"}, "runs of the mask hold"),
        ([], "no polygons"),
        ([[1, 1, 5, 5]], "at least three x, y"),
        ([[1, 1, 5, 5, 9]], "at least three x, y"),
        ([[1, 1, 5, 5, 50, 9]], r"reaches to \[50.0, 9.0\], outside the image"),
        ([[1, 1, 5, float("nan"), 5, 9]], "a polygon is a list"),
        ([[1, 1, "a", 2, 5, 9]], "a polygon is a list"),
        ([[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]], "holds the centre of no pixel"),
        (7, "a mask is an array, a picture"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        mask_shape(mask, 40, 30)


@given(st.lists(corner, min_size=2, max_size=6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_points_along_a_scribble(line: list[tuple[float, float]], as_array: bool) -> None:
    shape = scribble_shape(np.array(line) if as_array else [list(point) for point in line], 40, 30)
    x1, y1, x2, y2 = shape.box
    assert 0 <= x1 < x2 <= 40
    assert 0 <= y1 < y2 <= 30
    for x, y in [*line, *shape.points]:
        assert x1 - 1e-9 <= x <= x2 + 1e-9
        assert y1 - 1e-9 <= y <= y2 + 1e-9
    if len(set(line)) > 1:
        assert len(shape.points) == SHAPE_POINTS
        straight = scribble_shape([line[0], line[1]], 40, 30).points
        gaps = np.linalg.norm(np.diff(straight, axis=0), axis=1)
        np.testing.assert_allclose(gaps, np.linalg.norm(np.subtract(line[1], line[0])) / SHAPE_POINTS, atol=1e-5)


@pytest.mark.parametrize(
    ("scribble", "problem"),
    [
        ([[1, 1]], "at least two points"),
        ([], "a scribble is a list of"),
        ([[1, 1], [41, 2]], r"reaches to \[41.0, 2.0\], outside the image of 40 x 30"),
        ([[1, 1], [-0.1, 2]], "outside the image"),
        ([[1, 1], [1, float("inf")]], "a scribble is a list of"),
        ([[1, 1, 2], [1, 1, 3]], "a scribble is a list of"),
        ([[1, 1], [1]], "a scribble is a list of"),
        ({"points": [[1, 1], [2, 2]]}, "a scribble is a list of"),
        (None, "a scribble is a list of"),
    ],
)
def test_what_is_no_scribble_is_refused(scribble: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        scribble_shape(scribble, 40, 30)


def test_points_are_spread_over_the_shape_and_off_its_rim() -> None:
    mask = np.zeros((300, 400), dtype=bool)
    mask[50:250, 40:80] = mask[50:90, 40:340] = True  # an L
    points = mask_shape(mask, 400, 300).points
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)[~np.eye(len(points), dtype=bool)]
    assert distance.min() > 30
    for x, y in points:
        assert mask[int(y) - 10 : int(y) + 11, int(x) - 10 : int(x) + 11].all()
    # The L has as many of them as its parts have area: 40 x 200 down, 260 x 40 across.
    assert abs((points[:, 0] < 80).sum() - SHAPE_POINTS * 8000 / 18400) <= 1
    big = np.repeat(np.repeat(mask, 4, axis=0), 4, axis=1)
    np.testing.assert_allclose(mask_shape(big, 1600, 1200).points / 4, points, atol=25)


def test_few_pixels_are_their_own_points() -> None:
    pixels = np.array([[1.5, 2.5], [3.5, 2.5]])
    assert spread_points(pixels, 8) is pixels


def test_data_and_models_know_the_same_kinds_of_region() -> None:
    assert REGION_KINDS == SHAPE_KINDS
