"""Free-form regions: masks in every form they are written in, and scribbles, brought down to a box and a few points.

The Prompter takes boxes and points, so those are what it is told of a shape: the box around it, and points spread over
the inside. Everything here is in pixels of the original image; pixel ``(column, row)`` covers the square
from there to one further right and below, and its centre is half a pixel from its corner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

SHAPE_POINTS = 8
"""Most points that tell the Prompter of a free-form region, beside the two corners of its box."""

SHAPE_KINDS = ("box", "point", "mask", "scribble")
"""How a region may be given: exactly one of these keys."""

_CANDIDATES = 1024
_ROUNDS = 4


@dataclass(frozen=True)
class Shape:
    """A free-form region.

    Attributes:
        box: ``[x1, y1, x2, y2]`` in pixels: the smallest that holds every pixel of it.
        points: ``(P, 2)`` float64 x, y in pixels on it, at most :data:`SHAPE_POINTS`.
    """

    box: list[float]
    points: np.ndarray


def read_mask(source: Any, width: int, height: int) -> np.ndarray:
    """Read a mask of an image.

    Args:
        source: An ``(H, W)`` array of bool or of whole numbers, 0 outside; a PIL image of mode ``1`` or ``L``, or the
            path of one; COCO's run-length code, ``{"size": [height, width], "counts": text or list}``; or COCO's
            polygons, ``[[x1, y1, x2, y2, x3, y3, ...], ...]`` in pixels, of which a pixel belongs to the region if its
            centre lies within one.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        ``(height, width)`` bool.

    Raises:
        ValueError: If it cannot be read, is of another size than the image, or is empty.
    """
    if isinstance(source, (str, PathLike)):
        mask = _picture_mask(_open(source))
    elif isinstance(source, Image.Image):
        mask = _picture_mask(source)
    elif isinstance(source, Mapping):
        # Before it is decoded: a few letters may stand for more pixels than there is memory.
        _require_size(_rle_size(source), width, height)
        mask = decode_rle(source)
    elif isinstance(source, (list, tuple)):
        mask = fill_polygons(source, width, height)
    elif hasattr(source, "__array__"):
        mask = _array_mask(np.asarray(source))
    else:
        raise ValueError(
            f"a mask is an array, a picture or the path of one, a run-length code or polygons, not {source!r}"
        )
    _require_size((mask.shape[0], mask.shape[1]), width, height)
    if not mask.any():
        raise ValueError("the mask is empty: it holds the centre of no pixel")
    return mask


def _require_size(shape: tuple[int, int], width: int, height: int) -> None:
    if shape != (height, width):
        raise ValueError(
            f"the mask is {shape[1]} x {shape[0]} pixels, but its image is {width} x {height}: masks are of the "
            "original image, after its EXIF rotation"
        )


def _open(path: str | PathLike[str]) -> Image.Image:
    try:
        picture = Image.open(Path(path))
        picture.load()
    except FileNotFoundError as error:
        raise ValueError(f"mask {str(path)!r} does not exist") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"mask {str(path)!r} cannot be read as a picture: {error}") from error
    return picture


def _picture_mask(picture: Image.Image) -> np.ndarray:
    if picture.mode not in ("1", "L"):
        raise ValueError(
            f"the mask is a picture of mode {picture.mode!r}: use '1' or 'L', 0 outside the region (a picture of "
            "several labels holds several masks)"
        )
    return np.asarray(picture) != 0


def _array_mask(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "bui":
        raise ValueError(f"a mask is an (H, W) array of bool or uint8, not {array.shape} of {array.dtype}")
    return array != 0


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Decode COCO's run-length code.

    Runs go down the columns, outside and inside by turns, the first outside. ``counts`` are their lengths, as a list or
    packed into a text: each is then written in groups of five bits, lowest first, from ``'0'`` on, with a bit that says
    whether more follow and the sign in the last; from the fourth on it is the difference to the one before last. (The
    form is that of COCO's ``maskApi``.)

    Args:
        rle: ``{"size": [height, width], "counts": list, str or bytes}``.

    Returns:
        ``(height, width)`` bool.

    Raises:
        ValueError: If it is malformed, or the runs do not fill the mask.
    """
    (height, width), counts = _rle_size(rle), rle["counts"]
    runs = _unpack(counts) if isinstance(counts, (str, bytes)) else list(counts)
    if not all(_is_whole(run) and run >= 0 for run in runs):
        raise ValueError("the runs of the mask are not all whole numbers of pixels")
    # Added up in Python: runs of a damaged code may be too long for any fixed size of number.
    total = sum(int(run) for run in runs)
    if total != width * height:
        raise ValueError(f"the runs of the mask hold {total} pixels, but its size is {width} x {height}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, np.asarray(runs, dtype=np.int64)).reshape(width, height).T


def _rle_size(rle: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a run-length code, whose form is checked."""
    size, counts = rle.get("size"), rle.get("counts")
    right = isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_whole(v) and v > 0 for v in size)
    if not right or not isinstance(counts, (str, bytes, list, tuple, np.ndarray)) or set(rle) != {"size", "counts"}:
        raise ValueError('a run-length code is {"size": [height, width], "counts": text or list}')
    return int(rle["size"][0]), int(rle["size"][1])


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _unpack(packed: str | bytes) -> list[int]:
    """The run lengths in a compressed code."""
    try:
        data = packed.encode("ascii") if isinstance(packed, str) else packed
    except UnicodeEncodeError as error:
        raise ValueError("the run-length code holds letters that are none of its own") from error
    runs: list[int] = []
    value, shift = 0, 0
    for byte in data:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError("the run-length code holds letters that are none of its own")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("the run-length code is cut off")
    return runs


def fill_polygons(polygons: Sequence[Any], width: int, height: int) -> np.ndarray:
    """The pixels whose centres lie within any of some polygons, by the even-odd rule for each.

    Args:
        polygons: Each ``[x1, y1, x2, y2, x3, y3, ...]`` in pixels of the image.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        ``(height, width)`` bool.

    Raises:
        ValueError: If one is malformed or reaches outside the image.
    """
    if not polygons:
        raise ValueError("the mask has no polygons")
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon of a mask is a flat list of at least three x, y: [x1, y1, x2, y2, x3, y3, ...]")
        corners = _coordinates([polygon[k : k + 2] for k in range(0, len(polygon), 2)], width, height, "a polygon")
        top, bottom = math.floor(corners[:, 1].min()), math.ceil(corners[:, 1].max())
        # A row's pixels change sides right of every edge that the row's middle line crosses.
        changes = np.zeros((bottom - top, width + 1), dtype=bool)
        for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            first, last = sorted((math.ceil(y1 - 0.5), math.ceil(y2 - 0.5)))
            rows = np.arange(first, last)
            if len(rows):
                crossing = x1 + (rows + 0.5 - y1) / (y2 - y1) * (x2 - x1)
                changes[rows - top, np.clip(np.ceil(crossing - 0.5).astype(np.int64), 0, width)] ^= True
        mask[top:bottom] |= np.logical_xor.accumulate(changes, axis=1)[:, :width]
    return mask


def _coordinates(points: Sequence[Any], width: int, height: int, what: str) -> np.ndarray:
    """``(N, 2)`` float64 points, checked to be finite and on the image."""
    try:
        found = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} is a list of [x, y] in pixels, not {points!r}") from error
    if found.ndim != 2 or found.shape[1] != 2 or not np.isfinite(found).all():
        raise ValueError(f"{what} is a list of [x, y] in pixels, not {points!r}")
    if (found < 0).any() or (found > (width, height)).any():
        outside = found[(found < 0).any(axis=1) | (found > (width, height)).any(axis=1)][0].tolist()
        raise ValueError(f"{what} reaches to {outside}, outside the image of {width} x {height} pixels")
    return found


def mask_shape(source: Any, width: int, height: int) -> Shape:
    """The box around a mask and points spread over it; arguments and errors as :func:`read_mask`."""
    rows, columns = read_mask(source, width, height).nonzero()
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    pixels = np.stack([columns, rows], axis=1) + 0.5
    return Shape([float(value) for value in box], spread_points(pixels, SHAPE_POINTS))


def scribble_shape(points: Any, width: int, height: int) -> Shape:
    """The box around a scribble, and points at equal distances along it.

    Args:
        points: ``[[x, y], [x, y], ...]`` in pixels, at least two: the line from each to the next is the scribble.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Raises:
        ValueError: If it is malformed or reaches outside the image.
    """
    if not isinstance(points, (list, tuple)) and not hasattr(points, "__array__"):
        raise ValueError(f"a scribble is a list of [x, y] in pixels, not {points!r}")
    line = _coordinates(points, width, height, "a scribble")
    if len(line) < 2:
        raise ValueError("a scribble has at least two points: give a lone one as 'point'")
    # A straight stroke has no area of its own; the pixels it passes through have.
    limit = np.array([width, height])
    low = np.minimum(np.floor(line.min(axis=0)), limit - 1)
    high = np.minimum(np.floor(line.max(axis=0)) + 1, limit)
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    travelled = np.concatenate([[0.0], steps.cumsum()])
    wanted = (np.arange(SHAPE_POINTS) + 0.5) / SHAPE_POINTS * travelled[-1]
    along = np.stack([np.interp(wanted, travelled, line[:, axis]) for axis in (0, 1)], axis=1)
    return Shape([*low.tolist(), *high.tolist()], along if travelled[-1] else line[:1])


def spread_points(pixels: np.ndarray, count: int) -> np.ndarray:
    """Pick points that are spread evenly over a shape: the same ones every time.

    The pixel nearest to the middle, then by turns the one farthest from all picked (farthest-point sampling); then a
    few rounds in which each moves to the pixel nearest to the middle of those it is nearest to (Lloyd's), since the
    farthest ones lie on the rim, where the picture shows two things.

    Args:
        pixels: ``(N, 2)`` centres of the shape's pixels.
        count: Points wanted.

    Returns:
        ``(min(N, count), 2)`` of the pixels, each different.
    """
    if len(pixels) <= count:
        return pixels
    # A coarser raster of a large shape: every n-th row and column, so that the thinning favours no part of it.
    stride = max(1, math.isqrt(len(pixels) // _CANDIDATES))
    coarse = pixels[(np.floor(pixels).astype(np.int64) % stride == 0).all(axis=1)]
    if len(coarse) > count:
        pixels = coarse
    picked = [_nearest(pixels, pixels.mean(axis=0))]
    distance = np.linalg.norm(pixels - pixels[picked[0]], axis=1)
    while len(picked) < count:
        picked.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(pixels - pixels[picked[-1]], axis=1))
    for _ in range(_ROUNDS):
        owner = np.linalg.norm(pixels[:, None] - pixels[picked][None], axis=2).argmin(axis=1)
        cells = [np.flatnonzero(owner == k) for k in range(count)]
        moved = [int(cell[_nearest(pixels[cell], pixels[cell].mean(axis=0))]) for cell in cells]
        if moved == picked:
            break
        picked = moved
    return pixels[picked]


def _nearest(points: np.ndarray, place: np.ndarray) -> int:
    return int(np.square(points - place).sum(axis=1).argmin())
