"""Draws scenes: anti-aliased shapes with a texture on a muted, never plain background.

Speed decides the design (a data set must not cost more than the training on it): every shape is drawn once at high
resolution, shrunk per size and angle, and cached as a small alpha mask; noise is a random crop of one fixed field.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from cloc_mllm.data.scenes.objects import SceneObject
from cloc_mllm.data.scenes.vocabulary import COLOURS, REFERENCE_SIDE

FloatArray = npt.NDArray[np.float32]

_FINE = 256
_NOISE_SIDE = 512
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1.08, 0.9), (-1.08, 0.9)],
    "cross": [
        *[(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34)],
        *[(0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)],
    ],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "arrow": [(-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28)],
    "hourglass": [(-0.8, -1), (0.8, -1), (0.14, 0), (0.8, 1), (-0.8, 1), (-0.14, 0)],
}


def _fine_mask(shape: str) -> Image.Image:
    """A shape at high resolution, white on black, with room to turn it."""
    axis = np.linspace(-1.5, 1.5, _FINE, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    radius = np.hypot(x, y)
    if shape == "circle":
        inside = radius <= 1
    elif shape == "ring":
        inside = (radius <= 1) & (radius >= 0.55)
    elif shape == "crescent":
        inside = (radius <= 1) & (np.hypot(x - 0.5, y) > 0.82)
    elif shape == "frame":
        reach = np.maximum(np.abs(x), np.abs(y))
        inside = (reach <= 1) & (reach >= 0.55)
    elif shape == "heart":
        u, v = 1.2 * x, 0.1 - 1.2 * y
        inside = (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0
    else:
        mask = Image.new("L", (_FINE, _FINE))
        points = _star() if shape == "star" else _POLYGONS[shape]
        ImageDraw.Draw(mask).polygon(
            [((px / 1.5 + 1) / 2 * _FINE, (py / 1.5 + 1) / 2 * _FINE) for px, py in points], 255
        )
        return mask
    return Image.fromarray((inside * 255).astype(np.uint8))


def _star() -> list[tuple[float, float]]:
    """Corners of a five-pointed star, one point up."""
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return [(float(r * np.sin(t)), float(-r * np.cos(t))) for r, t in zip(reach, turns, strict=True)]


@lru_cache(maxsize=256)
def _turned_mask(shape: str, angle: int) -> Image.Image:
    """A shape at high resolution, turned and cropped to its tight box."""
    fine = _fine_mask(shape).rotate(angle, Image.Resampling.BICUBIC)
    return fine.crop(fine.point(lambda value: 255 * (value > 127)).getbbox())


@lru_cache(maxsize=8192)
def shape_mask(shape: str, pixels: int, angle: int) -> FloatArray:
    """The alpha mask of a shape, cropped to its tight box.

    Args:
        shape: Name of the shape.
        pixels: Longest side of the box.
        angle: Turn in degrees, anticlockwise.

    Returns:
        (h, w) float32 in [0, 1] with `max(h, w) == pixels`; every border row and column holds a value of at least
        one half, so that the mask's extent is the object's box.
    """
    fine = _turned_mask(shape, angle)
    scale = pixels / max(fine.size)
    size = (max(1, round(fine.width * scale)), max(1, round(fine.height * scale)))
    mask: FloatArray = np.asarray(fine.resize(size, Image.Resampling.BOX), dtype=np.float32) / np.float32(255)
    # Points of a star can fade below one half in the outermost row: strengthen the border there instead of moving it.
    for row in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        if row.max() < 0.5:
            row[row.argmax()] = 0.6
    mask.flags.writeable = False
    return mask


@lru_cache(maxsize=64)
def _pattern(texture: str, unit: int, orientation: int) -> npt.NDArray[np.bool_]:
    """A (128, 128) tile that is True where a texture puts its second colour; `unit` is the period in pixels."""
    y, x = np.mgrid[0:128, 0:128]
    if texture == "striped":
        along = (x, y, x + y, x - y)[orientation]
        # Diagonal stripes are sqrt(2) nearer to each other than their period along an axis.
        period = unit if orientation < 2 else round(unit * 1.41)
        return (along % period) < 0.45 * period
    cell = (x + unit // 2 * ((y // unit) % 2)) % unit - unit / 2 + 0.5, y % unit - unit / 2 + 0.5
    dots: npt.NDArray[np.bool_] = np.hypot(*cell) <= 0.33 * unit
    return dots


@lru_cache(maxsize=1)
def _noise_bank() -> FloatArray:
    """One fixed field of unit gaussian noise, shared by every picture through random crops."""
    return np.random.default_rng(20240607).standard_normal((_NOISE_SIDE, _NOISE_SIDE)).astype(np.float32)


@lru_cache(maxsize=4)
def _axis(side: int) -> FloatArray:
    return np.linspace(-1, 1, side, dtype=np.float32)


def background(rng: np.random.Generator, side: int) -> FloatArray:
    """A muted background: a gradient between two greyish tones, blocks, and gaussian noise.

    Returns:
        (side, side, 3) float32 in the range of pixel values.
    """
    grey = rng.uniform(70, 135)
    start, stop = grey + rng.uniform(-22, 22, (2, 3)).astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    slope = 0.5 + 0.35 * (
        np.float32(np.cos(turn)) * _axis(side)[None] + np.float32(np.sin(turn)) * _axis(side)[:, None]
    )
    cells = int(rng.integers(3, 9))
    block = -(-side // cells)
    blocks = rng.uniform(-12, 12, (cells, cells)).astype(np.float32).repeat(block, 0).repeat(block, 1)[:side, :side]
    top, left = rng.integers(0, max(1, _NOISE_SIDE - side), 2)
    repeats = -(-side // _NOISE_SIDE)
    bank = _noise_bank() if repeats == 1 else np.tile(_noise_bank(), (repeats + 1, repeats + 1))
    noise = bank[top : top + side, left : left + side]
    texture = blocks + np.float32(rng.uniform(2, 8)) * noise
    canvas: FloatArray = (start + slope[..., None] * (stop - start) + texture[..., None]).astype(np.float32)
    return canvas


def paint(canvas: FloatArray, thing: SceneObject, rng: np.random.Generator) -> None:
    """Draws one object on a canvas in place; what it covers is occluded."""
    mask = shape_mask(thing.shape, thing.pixels, thing.angle)
    height, width = mask.shape
    base = np.asarray(COLOURS[thing.colour], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    fill: FloatArray = np.broadcast_to(base, (height, width, 3))
    if thing.texture != "solid":
        luminance = base @ np.asarray([0.299, 0.587, 0.114], np.float32)
        # White and black get grey, or a striped white thing and a striped black one would look the same.
        second = np.float32(125 if luminance > 225 or luminance < 40 else 25 if luminance > 140 else 240)
        scale = canvas.shape[0] / REFERENCE_SIDE
        unit = max(3, round((7 if thing.pixels > 20 * scale else 5) * scale))
        tile = _pattern(thing.texture, unit, int(rng.integers(4)))
        top, left = rng.integers(0, unit, 2)
        tile = tile[np.arange(top, top + height)[:, None] % 128, np.arange(left, left + width) % 128]
        fill = np.where(tile[..., None], second, fill)
    left, top = thing.box[:2]
    patch = canvas[top : top + height, left : left + width]
    patch += mask[..., None] * (fill - patch)


def render(objects: Sequence[SceneObject], rng: np.random.Generator, side: int) -> Image.Image:
    """A picture of objects, later ones in front of earlier ones.

    Args:
        objects: What to draw, in drawing order.
        rng: Decides background, colour jitter and texture phase.
        side: Width and height in pixels.

    Returns:
        A (side, side) RGB picture.
    """
    canvas = background(rng, side)
    for thing in objects:
        paint(canvas, thing, rng)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
