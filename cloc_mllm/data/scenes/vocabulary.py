"""What scenes are made of: shapes, colours, sizes, textures, and the presets that say how hard a scene is.

A preset is the only place that decides difficulty. `quick` is small enough for two CPU cores to learn in minutes;
`full` has the vocabulary that keeps recall figures from saturating (12 x 10 x 3 classes without size).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cloc_mllm.errors import ClocError

SPLITS = ("train", "validation", "test")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (40, 176, 60),
    "blue": (45, 80, 232),
    "yellow": (244, 216, 32),
    "purple": (170, 50, 205),
    "cyan": (30, 212, 226),
    "orange": (250, 136, 20),
    "pink": (255, 150, 190),
    "white": (248, 248, 248),
    "black": (14, 14, 14),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "heart",
    "crescent",
    "arrow",
    "hourglass",
    "frame",
)
TEXTURES = ("solid", "striped", "dotted")
SIZES: dict[str, tuple[int, int]] = {"small": (20, 23), "medium": (28, 32), "large": (38, 45)}
"""Longest side of an object's box in pixels (inclusive) when the picture is 96 pixels wide."""

REFERENCE_SIDE = 96


@dataclass(frozen=True)
class ScenePreset:
    """Everything that decides how hard the scenes of a data set are.

    Attributes:
        name: What `--preset` calls it.
        shapes: Shape names in use.
        colours: Colour names in use.
        sizes: Size names in use (keys of `SIZES`).
        textures: Texture names in use.
        objects: Fewest and most objects of a scene.
        rotation: Objects are turned by one of these angles, in degrees.
        max_overlap: Largest share of the smaller of two boxes that the other may cover.
        distractors: Share of scenes in which an object is made to share shape or colour with another.
        say_colour: Probability that a description names the colour.
        say_texture: Probability that a description names the texture.
        say_size: Probability that a description names the size.
        vqa_turns: Visual questions in a training conversation.
        referring_turns: "What is <region>?" turns in a training conversation.
        grounding_turns: "Where is ...?" turns in a training conversation.
    """

    name: str
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[str, ...]
    textures: tuple[str, ...]
    objects: tuple[int, int]
    rotation: tuple[int, ...] = (0,)
    max_overlap: float = 0.18
    distractors: float = 0.35
    say_colour: float = 0.97
    say_texture: float = 0.8
    say_size: float = 0.25
    vqa_turns: int = 2
    referring_turns: int = 2
    grounding_turns: int = 1

    def vocabulary(self) -> dict[str, list[str]]:
        """The words of each attribute, in the order that class indices follow."""
        return {
            "shape": list(self.shapes),
            "colour": list(self.colours),
            "size": list(self.sizes),
            "texture": list(self.textures),
        }

    def to_dict(self) -> dict[str, Any]:
        """The preset as plain data, for `dataset.json`."""
        return asdict(self)


PRESETS: dict[str, ScenePreset] = {
    "quick": ScenePreset(
        name="quick",
        shapes=SHAPES[:6],
        colours=tuple(COLOURS)[:6],
        sizes=("medium", "large"),
        textures=("solid", "striped"),
        objects=(2, 4),
    ),
    "full": ScenePreset(
        name="full",
        shapes=SHAPES,
        colours=tuple(COLOURS),
        sizes=tuple(SIZES),
        textures=TEXTURES,
        objects=(2, 5),
    ),
}


def get_preset(name: str) -> ScenePreset:
    """The preset called `name`.

    Raises:
        ClocError: There is none of that name.
    """
    if name not in PRESETS:
        raise ClocError(f"there is no scene preset '{name}'", remedy=f"Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def heldout_pairs(preset: ScenePreset, seed: int) -> frozenset[tuple[str, str]]:
    """The (shape, colour) pairs that occur in the test split only: one pair in nine.

    Pairs are taken along a random diagonal of the shape x colour table, so that no shape and no colour loses more
    than its share and each of them is well known from training in other company.
    """
    rng = np.random.default_rng([seed, 7001])
    shapes, colours = rng.permutation(preset.shapes), rng.permutation(preset.colours)
    count = max(1, round(len(shapes) * len(colours) / 9))
    # Walking shapes and colours together repeats only after lcm(len, len) steps; each full round of the shapes is
    # shifted by one colour more, so pairs stay distinct for square tables too.
    pairs = [
        (str(shapes[k % len(shapes)]), str(colours[(k + k // len(shapes)) % len(colours)]))
        for k in range(len(shapes) * len(colours))
    ]
    return frozenset(list(dict.fromkeys(pairs))[:count])
