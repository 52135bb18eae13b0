"""How many tokens an image becomes, and from which tiles: the one place that counts, for model and processor alike.

An image is either one square, or, with ``anyres``, LLaVA-NeXT's scheme (transformers' ``llava_next`` is the source of
the arithmetic): the whole picture stretched to a square, the overview, and behind it the picture at one of a few larger
resolutions, cut into squares of the tower's size. The tokens of those tiles are put together again, what lies wholly in
the padding is left out, and each row of tokens ends in a learnt ``image_newline``.

Heights come before widths here, as in LLaVA-NeXT's ``image_grid_pinpoints`` and ``image_sizes``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .configuration_cloc import has_class_token

PROJECTOR_TYPES = ("mlp2x_gelu", "linear", "pixel_shuffle")


def default_pinpoints(size: int) -> list[list[int]]:
    """LLaVA-NeXT's resolutions for a tower of ``size`` pixels: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 tiles."""
    return [[size * rows, size * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def checked_pinpoints(pinpoints: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Resolutions as lists.

    Args:
        pinpoints: ``[height, width]`` in pixels.
        size: Side of a tile in pixels.

    Raises:
        ValueError: If there is none, or one that tiles of that size do not fill.
    """
    found = [[int(side) for side in pinpoint] for pinpoint in pinpoints]
    wrong = [one for one in found if len(one) != 2 or min(one) <= 0 or any(side % size for side in one)]
    if not found or wrong:
        which = wrong[0] if wrong else "an empty list"
        raise ValueError(
            f"image_grid_pinpoints: {which} cannot be cut into tiles of {size} x {size} pixels; "
            f"give [height, width] in multiples of {size}"
        )
    return found


def best_resolution(height: int, width: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution that keeps most of an image's pixels and, of those alike, wastes the least.

    Args:
        height: Height of the original image in pixels.
        width: Width of the original image in pixels.
        pinpoints: ``[height, width]`` to choose from; the first of equals is taken.
    """

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=merit)
    return best[0], best[1]


def scaled_size(height: int, width: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image in pixels, its aspect kept, that just fits into a resolution."""
    by_height, by_width = resolution[0] / height, resolution[1] / width
    if by_width < by_height:
        return min(math.ceil(height * by_width), resolution[0]), resolution[1]
    return resolution[0], min(math.ceil(width * by_height), resolution[1])


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of images under one tower, projector and set of resolutions.

    Attributes:
        image_size: Side of a tile, the tower's input, in pixels.
        side: Tokens along each side of a tile, behind the projector.
        extra: Tokens of a tile beside those of its grid: 1 where a class token is kept.
        pinpoints: Resolutions ``(height, width)`` in pixels to choose from; empty if every image is one square.
    """

    image_size: int
    side: int
    extra: int = 0
    pinpoints: tuple[tuple[int, int], ...] = ()

    @classmethod
    def plan(
        cls,
        image_size: int,
        patch_size: int,
        extra: int,
        projector_type: str = "mlp2x_gelu",
        pixel_shuffle_factor: int = 2,
        pinpoints: Sequence[Sequence[int]] | None = None,
    ) -> ImageTokens:
        """Work out the tokens of an image.

        Args:
            image_size: Side of the tower's input in pixels.
            patch_size: Side of its patches in pixels.
            extra: Tokens that reach the projector beside the patches.
            projector_type: One of :data:`PROJECTOR_TYPES`.
            pixel_shuffle_factor: Patches along each side that ``pixel_shuffle`` makes one token of.
            pinpoints: Resolutions of ``anyres``, or ``None`` if every image is one square.

        Raises:
            ValueError: If the patches do not divide, or a class token is among them where only a grid will do.
        """
        side = image_size // patch_size
        if extra and (projector_type == "pixel_shuffle" or pinpoints is not None):
            what = "projector_type 'pixel_shuffle'" if projector_type == "pixel_shuffle" else "anyres"
            raise ValueError(
                f"{what} works on the grid of patches: vision_feature_select_strategy must drop the class token and "
                "nothing else"
            )
        if projector_type == "pixel_shuffle":
            if pixel_shuffle_factor < 1 or side % pixel_shuffle_factor:
                raise ValueError(
                    f"pixel_shuffle_factor {pixel_shuffle_factor} does not divide the tower's grid of {side} x {side} "
                    "patches"
                )
            side //= pixel_shuffle_factor
        found = () if pinpoints is None else checked_pinpoints(pinpoints, image_size)
        return cls(image_size, side, extra, tuple((height, width) for height, width in found))

    @classmethod
    def of(cls, config: Any) -> ImageTokens:
        """The tokens of an image under a :class:`ClocMllmConfig`; raises as :meth:`plan` does."""
        vision = config.vision_config
        return cls.plan(
            vision.image_size,
            vision.patch_size,
            int(has_class_token(vision)) - (config.vision_feature_select_strategy == "default"),
            config.projector_type,
            config.pixel_shuffle_factor,
            config.image_grid_pinpoints,
        )

    @property
    def per_tile(self) -> int:
        """Tokens of one tile, which is all of an image that is not cut into tiles."""
        return self.side**2 + self.extra

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles behind the overview; 0 and 0 where images are not cut into tiles."""
        if not self.pinpoints:
            return 0, 0
        resolution = best_resolution(height, width, self.pinpoints)
        return resolution[0] // self.image_size, resolution[1] // self.image_size

    def num_tiles(self, height: int, width: int) -> int:
        """How many rows of ``pixel_values`` an image of ``height`` x ``width`` original pixels takes."""
        rows, columns = self.grid(height, width)
        return 1 + rows * columns

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows of tokens at the top, and as many at the bottom, that lie in the padding; and columns at the left."""
        rows, columns = (count * self.side for count in self.grid(height, width))
        if width / height > columns / rows:
            return (rows - int(round(height * (columns / width), 7))) // 2, 0
        return 0, (columns - int(round(width * (rows / height), 7))) // 2

    def count(self, height: int, width: int) -> int:
        """How many tokens an image of ``height`` x ``width`` original pixels becomes."""
        if not self.pinpoints:
            return self.per_tile
        rows, columns = (count * self.side for count in self.grid(height, width))
        top, left = self.padding(height, width)
        return self.per_tile + (rows - 2 * top) * (columns - 2 * left + 1)
