"""Image to tensor: EXIF rotation, RGB, pad or stretch to a square, normalise.

Never a crop: CLIP's centre crop would cut regions off. Works on PIL alone, without torchvision.
"""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .geometry import RESIZE_MODES, Geometry

ImageSource = str | PathLike | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """Open an image as RGB with its EXIF rotation applied.

    Boxes always refer to the rotated picture, the one a viewer shows.

    Args:
        source: A path, encoded bytes, a PIL image, or an ``(H, W)`` or ``(H, W, 3)`` uint8 array.

    Returns:
        The RGB image, fully decoded.

    Raises:
        ValueError: If the file is missing, is not an image, or is cut off.
    """
    if isinstance(source, Image.Image) and source.mode == "RGB" and "exif" not in source.info:
        return source  # a picture that came through here before
    name = "the image" if isinstance(source, (bytes, Image.Image, np.ndarray)) else f"image {str(source)!r}"
    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source)
        elif isinstance(source, bytes):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(Path(source))
        image.load()
        # Both copy the pixels even where there is nothing to do.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to open safely: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


class ClocImageProcessor(BaseImageProcessor):
    """Turns images into the square tensors a tower takes, and knows each image's :class:`Geometry`.

    Args:
        size: Side of the model frame in pixels.
        resize_mode: ``pad`` (the paper: long side resized, then padded) or ``resize`` (stretched).
        image_mean: Mean of each channel, subtracted after scaling to [0, 1]; also the colour of the padding.
        image_std: Standard deviation of each channel.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int = 224,
        resize_mode: str = "pad",
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"unknown resize mode {resize_mode!r}: use one of {', '.join(RESIZE_MODES)}")
        self.size = size
        self.resize_mode = resize_mode
        self.image_mean = list(OPENAI_CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = list(OPENAI_CLIP_STD if image_std is None else image_std)

    def geometry(self, width: int, height: int) -> Geometry:
        """The geometry of an original image of ``width`` x ``height`` pixels under this processor."""
        return Geometry.fit(width, height, self.size, self.resize_mode)

    def _to_frame(self, image: Image.Image) -> np.ndarray:
        """One RGB image as a ``(size, size, 3)`` uint8 array of the model frame."""
        place = self.geometry(*image.size)
        if image.size != (place.scaled_width, place.scaled_height):
            image = image.resize((place.scaled_width, place.scaled_height), Image.Resampling.BICUBIC)
        if (place.scaled_width, place.scaled_height) == (self.size, self.size):
            return np.asarray(image)
        frame = np.empty((self.size, self.size, 3), dtype=np.uint8)
        frame[:] = np.round(np.asarray(self.image_mean) * 255).astype(np.uint8)
        frame[place.top : place.top + place.scaled_height, place.left : place.left + place.scaled_width] = np.asarray(
            image
        )
        return frame

    def preprocess(
        self, images: ImageSource | list[ImageSource], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Turn images into one tensor.

        Args:
            images: One image or a list, each anything :func:`load_image` takes.
            return_tensors: Anything transformers' ``BatchFeature`` takes.
            **kwargs: Refused: a misspelt option must not pass unseen.

        Returns:
            ``pixel_values`` of shape ``(B, 3, size, size)``, float32.

        Raises:
            ValueError: If an image cannot be read.
            TypeError: If an unknown option is given.
        """
        if kwargs:
            raise TypeError(f"unknown option for the image processor: {', '.join(sorted(kwargs))}")
        images = images if isinstance(images, (list, tuple)) else [images]
        frames = np.stack([self._to_frame(load_image(image)) for image in images])
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(torch.float32).div_(255.0).sub_(mean).div_(std)
        return BatchFeature({"pixel_values": pixels.contiguous()}, tensor_type=return_tensors)

    def __call__(self, images: ImageSource | list[ImageSource], **kwargs: Any) -> BatchFeature:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)
