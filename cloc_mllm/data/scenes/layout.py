"""Decides what stands where in a scene: attributes, distractors, and places that hardly overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.data.scenes.objects import Box, Pair, SceneObject
from cloc_mllm.data.scenes.render import shape_mask
from cloc_mllm.data.scenes.vocabulary import REFERENCE_SIDE, SIZES, ScenePreset

_PLACE_TRIES = 25
_LAYOUT_TRIES = 20


def overlap_of_smaller(a: Box, b: Box) -> float:
    """The area two boxes share, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _draw_pair(preset: ScenePreset, rng: np.random.Generator, forbidden: frozenset[Pair]) -> Pair:
    while True:
        pair = (_pick(rng, preset.shapes), _pick(rng, preset.colours))
        if pair not in forbidden:
            return pair


def _draw_pairs(preset: ScenePreset, rng: np.random.Generator, count: int, forbidden: frozenset[Pair]) -> list[Pair]:
    """Shape and colour of every object; in some scenes the second object shares one of them with the first."""
    pairs = [_draw_pair(preset, rng, forbidden) for _ in range(count)]
    if count > 1 and rng.random() < preset.distractors:
        shape, colour = pairs[0]
        if rng.random() < 0.5:
            choices = [(shape, other) for other in preset.colours if other != colour]
        else:
            choices = [(other, colour) for other in preset.shapes if other != shape]
        choices = [pair for pair in choices if pair not in forbidden]
        pairs[1] = choices[int(rng.integers(len(choices)))]
    return pairs


def _place(
    preset: ScenePreset, rng: np.random.Generator, extents: Sequence[tuple[int, int]], side: int
) -> list[Box] | None:
    """Boxes for objects of the given (width, height), or None when they found no room."""
    boxes: dict[int, Box] = {}
    for k in sorted(range(len(extents)), key=lambda k: -extents[k][0] * extents[k][1]):
        width, height = extents[k]
        tries = rng.random((_PLACE_TRIES, 2))
        for x, y in tries:
            left, top = int(x * (side - width + 1)), int(y * (side - height + 1))
            box = (left, top, left + width, top + height)
            if all(overlap_of_smaller(box, other) <= preset.max_overlap for other in boxes.values()):
                boxes[k] = box
                break
        else:
            return None
    return [boxes[k] for k in range(len(extents))]


def sample_layout(
    preset: ScenePreset, rng: np.random.Generator, side: int, forbidden: frozenset[Pair] = frozenset()
) -> list[SceneObject]:
    """Objects of one scene, in drawing order.

    Args:
        preset: Vocabulary and difficulty.
        rng: Source of every choice.
        side: Width and height of the picture in pixels.
        forbidden: (shape, colour) pairs that must not occur.

    Returns:
        At least `preset.objects[0]` objects, each box inside the picture and overlapping no other by more than
        `preset.max_overlap` of the smaller one.
    """
    low, high = preset.objects
    count = int(rng.integers(low, high + 1))
    pairs = _draw_pairs(preset, rng, count, forbidden)
    textures = [_pick(rng, preset.textures) for _ in pairs]
    for attempt in range(_LAYOUT_TRIES * count):
        # Crowded scenes first get new sizes (mostly smaller ones fit), and only after many failures one object less.
        kept = max(low, count - attempt // _LAYOUT_TRIES)
        sizes = [_pick(rng, preset.sizes) for _ in range(kept)]
        ranges = [SIZES[size] for size in sizes]
        pixels = [round(int(rng.integers(a, b + 1)) * side / REFERENCE_SIDE) for a, b in ranges]
        angles = [preset.rotation[int(rng.integers(len(preset.rotation)))] for _ in range(kept)]
        masks = [shape_mask(pairs[k][0], pixels[k], angles[k]) for k in range(kept)]
        boxes = _place(preset, rng, [(mask.shape[1], mask.shape[0]) for mask in masks], side)
        if boxes is not None:
            return [SceneObject(*pairs[k], sizes[k], textures[k], boxes[k], pixels[k], angles[k]) for k in range(kept)]
    raise RuntimeError(f"no layout of {low} objects fits a picture of {side} pixels: the preset asks for too much")
