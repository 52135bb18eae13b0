"""Image to tensor: EXIF rotation, RGB, one square or several tiles, normalise.

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
from .image_tokens import checked_pinpoints, default_pinpoints

ImageSource = str | PathLike | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """Open an image as RGB with its EXIF rotation applied, whatever its mode.

    Boxes always refer to the rotated picture, the one a viewer shows. What is transparent shows white, the page that
    such pictures are drawn for; 16 bits a channel become 8; of an animation the first frame is taken.

    Args:
        source: A path, encoded bytes, a PIL image, or an array: ``(H, W)`` bool, uint8 or uint16, ``(H, W, 3)`` or
            ``(H, W, 4)`` uint8. Single channels of more than 8 bits count as 16 bits, as Pillow reads them.

    Returns:
        The RGB image, fully decoded.

    Raises:
        ValueError: If the file is missing, is not an image, or is cut off, or its values have no known range.
    """
    if isinstance(source, Image.Image) and source.mode == "RGB" and not {"exif", "transparency"} & set(source.info):
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
        return _as_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to open safely: {error}") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode as RGB.

    Raises:
        ValueError: If its values have no known range, or there is no way from its mode to RGB.
    """
    if image.mode[0] in "IF":
        # Pillow would clip, not scale: every 16-bit scan would come out white.
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its mode is {image.mode!r}, numbers from {values.min()} to {values.max()}: scale them to 8 or 16 bits"
            )
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), picture)
    return image if image.mode == "RGB" and "transparency" not in image.info else image.convert("RGB")


class ClocImageProcessor(BaseImageProcessor):
    """Turns images into the square tensors a tower takes, and knows each image's :class:`Geometry`.

    Args:
        size: Side of the model frame in pixels.
        resize_mode: ``pad`` (the paper: long side resized, then padded), ``resize`` (stretched), or ``anyres``:
            LLaVA-NeXT's, the stretched picture and behind it the tiles of a larger one, padded with black.
        image_mean: Mean of each channel, subtracted after scaling to [0, 1]; also the colour of ``pad``'s padding.
        image_std: Standard deviation of each channel.
        image_grid_pinpoints: Resolutions ``[height, width]`` that ``anyres`` chooses from, in multiples of ``size``;
            ``None``: LLaVA-NeXT's for this size, or none without ``anyres``.

    Raises:
        ValueError: If the mode is unknown, or the resolutions cannot be cut into tiles or are not asked for.
    """

    model_input_names = ["pixel_values"]
    resample = Image.Resampling.BICUBIC

    def __init__(
        self,
        size: int = 224,
        resize_mode: str = "pad",
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"unknown resize mode {resize_mode!r}: use one of {', '.join(RESIZE_MODES)}")
        self.size = size
        self.resize_mode = resize_mode
        self.image_mean = list(OPENAI_CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = list(OPENAI_CLIP_STD if image_std is None else image_std)
        if resize_mode == "anyres":
            image_grid_pinpoints = checked_pinpoints(
                default_pinpoints(size) if image_grid_pinpoints is None else image_grid_pinpoints, size
            )
            self.model_input_names = ["pixel_values", "image_sizes"]
        elif image_grid_pinpoints is not None:
            raise ValueError(f"image_grid_pinpoints are for resize_mode 'anyres', not {resize_mode!r}")
        self.image_grid_pinpoints = image_grid_pinpoints

    def in_mode(self, resize_mode: str, image_grid_pinpoints: list[list[int]] | None = None) -> ClocImageProcessor:
        """This processor with another ``resize_mode``."""
        return type(self)(self.size, resize_mode, self.image_mean, self.image_std, image_grid_pinpoints)

    def geometry(self, width: int, height: int) -> Geometry:
        """The geometry of an original image of ``width`` x ``height`` pixels under this processor."""
        return Geometry.fit(width, height, self.size, self.resize_mode)

    def tiles(self, width: int, height: int) -> list[Geometry]:
        """The geometries of the tiles behind the overview, in the order of ``pixel_values``; none without them."""
        if self.image_grid_pinpoints is None:
            return []
        return Geometry.tiles(width, height, self.size, self.image_grid_pinpoints)

    def _to_frame(self, image: Image.Image) -> np.ndarray:
        """One RGB image as a ``(size, size, 3)`` uint8 array of the model frame."""
        place = self.geometry(*image.size)
        if image.size != (place.scaled_width, place.scaled_height):
            image = image.resize((place.scaled_width, place.scaled_height), self.resample)
        if (place.scaled_width, place.scaled_height) == (self.size, self.size):
            return np.asarray(image)
        frame = np.empty((self.size, self.size, 3), dtype=np.uint8)
        frame[:] = np.round(np.asarray(self.image_mean) * 255).astype(np.uint8)
        frame[place.top : place.top + place.scaled_height, place.left : place.left + place.scaled_width] = np.asarray(
            image
        )
        return frame

    def _to_tiles(self, image: Image.Image) -> list[np.ndarray]:
        """The tiles of one RGB image behind its overview, each ``(size, size, 3)`` uint8, cut out of black."""
        places = self.tiles(*image.size)
        if not places:
            return []
        scaled = (places[0].scaled_width, places[0].scaled_height)
        picture = image if image.size == scaled else image.resize(scaled, Image.Resampling.BICUBIC)
        # Pillow fills with black what lies outside of a picture that is cropped.
        corners = [(-place.left, -place.top) for place in places]
        return [np.asarray(picture.crop((x, y, x + self.size, y + self.size))) for x, y in corners]

    def preprocess(
        self, images: ImageSource | list[ImageSource], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Turn images into one tensor.

        Args:
            images: One image or a list, each anything :func:`load_image` takes.
            return_tensors: Anything transformers' ``BatchFeature`` takes.
            **kwargs: Refused: a misspelt option must not pass unseen.

        Returns:
            ``pixel_values`` of shape ``(B, 3, size, size)``, float32; with ``anyres`` a row for each tile, the overview
            of an image before its others, and ``image_sizes`` ``(B, 2)``, height and width of the originals in pixels.

        Raises:
            ValueError: If an image cannot be read.
            TypeError: If an unknown option is given.
        """
        if kwargs:
            raise TypeError(f"unknown option for the image processor: {', '.join(sorted(kwargs))}")
        images = images if isinstance(images, (list, tuple)) else [images]
        pictures = [load_image(image) for image in images]
        frames = np.stack([tile for one in pictures for tile in (self._to_frame(one), *self._to_tiles(one))])
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(torch.float32).div_(255.0).sub_(mean).div_(std)
        data = {"pixel_values": pixels.contiguous()}
        if self.image_grid_pinpoints is not None:
            data["image_sizes"] = torch.tensor([(one.height, one.width) for one in pictures])
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(self, images: ImageSource | list[ImageSource], **kwargs: Any) -> BatchFeature:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **kwargs)
