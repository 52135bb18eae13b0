"""How large a picture is, told from its header, for importers that have to check or convert boxes."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

_EXIF_ORIENTATION = 0x0112
_KEPT_SIZES = 1 << 16


def picture_size(picture: str | Path | bytes) -> tuple[int, int]:
    """Width and height of a picture as a viewer shows it, from its header alone.

    Args:
        picture: A path, or the encoded bytes.

    Raises:
        ClocError: It is missing, no picture, or too large to open safely.
    """
    from PIL import Image, UnidentifiedImageError

    file = None if isinstance(picture, bytes) else picture
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except FileNotFoundError as error:
        raise ClocError("the image does not exist", file=file, remedy="Check --images, or skip it.") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        # ValueError: the name holds a character that no file's can.
        raise ClocError(
            f"the image cannot be read: {error}", file=file, remedy="Fetch it again, or skip it."
        ) from error


def picture_in(folder: Path, name: str) -> Path:
    """The path of a picture in its folder.

    Raises:
        ClocError: The name leads out of the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ClocError("the name of a picture leads out of --images", file=path, remedy="Mend the annotation file.")
    return path


class Pictures:
    """The pictures of a data set: where they lie, and how large they are.

    Args:
        folder: What relative names start from.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._sizes: OrderedDict[Path, tuple[int, int]] = OrderedDict()

    def place(self, image: Any) -> Path | bytes:
        """Path or bytes of an image as a sample names it: a name, encoded bytes, or `datasets`' `{"bytes", "path"}`.

        Raises:
            ClocError: It is none of these, or leads out of the folder.
        """
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        if isinstance(image, str) and image and "://" not in image:
            return picture_in(self.folder, image)
        shown = image if isinstance(image, str) else type(image).__name__
        raise ClocError(f"'{shown}' names no image file", remedy="Fetch the pictures first, and name their folder.")

    def size(self, place: Path | bytes) -> tuple[int, int]:
        """Width and height in pixels; `ClocError` if it is missing or no picture. Remembered, as images recur."""
        if isinstance(place, bytes):
            return picture_size(place)
        if place not in self._sizes:
            self._sizes[place] = picture_size(place)
            if len(self._sizes) > _KEPT_SIZES:
                self._sizes.popitem(last=False)
        return self._sizes[place]
