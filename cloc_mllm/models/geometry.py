"""The one place that maps boxes and points between an original image and the frame a model sees.

Outside the package every coordinate is in pixels of the original image. Inside, between processor and model, boxes are
normalised to [0, 1] of the model frame: the square the tower is given, after resizing and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .image_tokens import best_resolution, scaled_size

RESIZE_MODES = ("pad", "resize", "anyres")


@dataclass(frozen=True)
class Geometry:
    """How one original image lies in the model frame.

    Attributes:
        width: Width of the original image in pixels.
        height: Height of the original image in pixels.
        size: Side of the square model frame in pixels.
        scaled_width: Width in pixels that the image takes up in the model frame.
        scaled_height: Height in pixels that the image takes up in the model frame.
        left: Columns of padding left of the image in the model frame.
        top: Rows of padding above the image in the model frame.
    """

    width: int
    height: int
    size: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int

    @classmethod
    def fit(cls, width: int, height: int, size: int, resize_mode: str = "pad") -> Geometry:
        """Place an image in a square model frame.

        Args:
            width: Width of the original image in pixels.
            height: Height of the original image in pixels.
            size: Side of the model frame in pixels.
            resize_mode: ``pad`` scales the long side to ``size`` and centres the image between equal bands of
                padding; ``resize`` stretches both sides to ``size``; so does ``anyres``, whose model frame is the
                overview (see :meth:`tiles` for the rest).

        Raises:
            ValueError: If a size is not positive or the mode is unknown.
        """
        if min(width, height, size) <= 0:
            raise ValueError(f"cannot place an image of {width} x {height} pixels in a frame of {size}")
        if resize_mode in ("resize", "anyres"):
            return cls(width, height, size, size, size, 0, 0)
        if resize_mode != "pad":
            raise ValueError(f"unknown resize mode {resize_mode!r}: use one of {', '.join(RESIZE_MODES)}")
        scale = size / max(width, height)
        scaled_width = max(1, round(width * scale))
        scaled_height = max(1, round(height * scale))
        return cls(
            width, height, size, scaled_width, scaled_height, (size - scaled_width) // 2, (size - scaled_height) // 2
        )

    @classmethod
    def tiles(cls, width: int, height: int, size: int, pinpoints: Sequence[Sequence[int]]) -> list[Geometry]:
        """Place an image in each of the tiles that ``anyres`` cuts it into, LLaVA-NeXT's way.

        Args:
            width: Width of the original image in pixels.
            height: Height of the original image in pixels.
            size: Side of a tile in pixels.
            pinpoints: Resolutions ``[height, width]`` to choose from, in multiples of ``size``.

        Returns:
            One geometry a tile, row by row, whose model frame is that tile. The image is larger than a tile: what of
            it lies elsewhere has coordinates below 0 or above 1 there, and negative ``left`` and ``top``.
        """
        resolution = best_resolution(height, width, pinpoints)
        scaled_height, scaled_width = scaled_size(height, width, resolution)
        top, left = (resolution[0] - scaled_height) // 2, (resolution[1] - scaled_width) // 2
        return [
            cls(width, height, size, scaled_width, scaled_height, left - column, top - row)
            for row in range(0, resolution[0], size)
            for column in range(0, resolution[1], size)
        ]

    @property
    def content(self) -> torch.Tensor:
        """``(4,)`` float32 xyxy: the part of the model frame that the picture fills, normalised."""
        return self.boxes_to_model([0.0, 0.0, float(self.width), float(self.height)])

    @property
    def _scale(self) -> torch.Tensor:
        # From the rounded sizes, not from one common factor: the picture really was resized to them.
        return torch.tensor([self.scaled_width / self.width, self.scaled_height / self.height], dtype=torch.float64)

    @property
    def _offset(self) -> torch.Tensor:
        return torch.tensor([self.left, self.top], dtype=torch.float64)

    def points_to_model(self, points: Sequence[Sequence[float]] | torch.Tensor) -> torch.Tensor:
        """Map points of the original image into the model frame.

        Args:
            points: ``(..., 2)`` x, y in pixels of the original image.

        Returns:
            ``(..., 2)`` float32, normalised to [0, 1] of the model frame. The arithmetic is float64, so a coordinate
            such as 1003.37 of a large image survives.
        """
        pixels = torch.as_tensor(points, dtype=torch.float64)
        return ((pixels * self._scale + self._offset) / self.size).to(torch.float32)

    def points_from_model(self, points: torch.Tensor) -> torch.Tensor:
        """Map ``(..., 2)`` normalised points of the model frame back to pixels, clipped to the original image."""
        pixels = (points.detach().cpu().to(torch.float64) * self.size - self._offset) / self._scale
        limit = torch.tensor([self.width, self.height], dtype=torch.float64)
        return torch.minimum(pixels.clamp(min=0), limit)

    def boxes_to_model(self, boxes: Sequence[float] | Sequence[Sequence[float]] | torch.Tensor) -> torch.Tensor:
        """Map ``(..., 4)`` xyxy boxes in original pixels to ``(..., 4)`` float32 boxes, normalised, model frame."""
        corners = torch.as_tensor(boxes, dtype=torch.float64)
        return self.points_to_model(corners.unflatten(-1, (2, 2))).flatten(-2)

    def boxes_from_model(self, boxes: torch.Tensor) -> torch.Tensor:
        """Map ``(..., 4)`` normalised boxes of the model frame to float64 pixels, clipped to the original image."""
        return self.points_from_model(boxes.unflatten(-1, (2, 2))).flatten(-2)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)
