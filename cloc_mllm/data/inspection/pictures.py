"""Pictures, each decoded once: whether it is sound, how large, of what format, and hashes of its bytes and looks."""

from __future__ import annotations

import hashlib
import io
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.readers import resolve_image
from cloc_mllm.data.schema import Problem, Size
from cloc_mllm.errors import ClocError

HASH_BITS = 64
FLAT_SPREAD = 2.0
"""Grey levels: a picture whose 32 x 32 thumbnail has a smaller standard deviation has no looks to compare."""

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})")
_COCO_SOURCES = ("coco", "lvis", "refcoco")
_NO_PICTURE = (
    (re.compile(rb"\s*(<!doctype html|<html|<head|<body)", re.I), "it is an HTML page, as servers send for a picture"),
    (re.compile(rb"\s*(<\?xml|<svg)", re.I), "it is XML or SVG, which has no pixels"),
    (re.compile(rb"version https://git-lfs"), "it is a pointer of Git LFS: fetch the file itself"),
    (re.compile(rb"\s*\{"), "it looks like JSON, perhaps a server's error"),
)


@dataclass(frozen=True)
class Picture:
    """What is known of one picture.

    Attributes:
        size: Width and height in pixels, after its EXIF rotation; None if it cannot be decoded.
        problem: What is wrong, if it cannot.
        format: As Pillow calls it; empty if unknown.
        length: Bytes of the file.
        content: 128-bit hash of the bytes as two numbers; zeros where it was not asked for.
        look: 64-bit perceptual hash.
        mirrored: The same of the picture seen in a mirror.
        flat: Whether it has next to no content, so that its looks mean nothing.
        notice: Something odd about it that is no fault; empty if there is nothing.
    """

    size: Size | None = None
    problem: Problem | None = None
    format: str = ""
    length: int = 0
    content: tuple[int, int] = (0, 0)
    look: int = 0
    mirrored: int = 0
    flat: bool = False
    notice: str = ""


def look_at(image: Any, folder: Path | None, hashes: bool = False) -> Picture:
    """Decode a picture in full and say what it is.

    Args:
        image: As a sample names it.
        folder: Where relative paths start.
        hashes: Also hash its bytes and its looks.
    """
    place = resolve_image(image, folder)
    try:
        decoded = open_image(image, folder, None, "")
    except ClocError as error:
        reason = _not_a_picture(place)
        remedy = "Fetch the file again or remove the sample." if reason else "Restore the file or remove the sample."
        return Picture(problem=Problem(f"{error.problem}: {reason}" if reason else error.problem, remedy))
    if not hashes:
        return Picture(decoded.size)
    data = place.read_bytes() if isinstance(place, Path) else place if isinstance(place, bytes) else b""
    small = decoded.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    shape = Image.open(io.BytesIO(data)).format or "" if data else ""
    return Picture(
        decoded.size,
        None,
        shape,
        len(data),
        digest(data) if data else (0, 0),
        look_hash(small),
        look_hash(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        float(np.asarray(small).std()) < FLAT_SPREAD,
        _notice(place, shape, decoded.size),
    )


def look_hash(picture: Image.Image) -> int:
    """The 64-bit perceptual hash of a picture: signs of the lowest 8 x 8 frequencies of its 32 x 32 thumbnail.

    Args:
        picture: Any size; a thumbnail of 32 x 32 made by Lanczos in grey has the hash of the picture itself.
    """
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(picture).hash).tobytes(), "big")


def digest(data: bytes) -> tuple[int, int]:
    """A 128-bit hash of some bytes, as two numbers."""
    found = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")


def _not_a_picture(place: Any) -> str:
    """What a file that is no picture is instead, where its first bytes tell."""
    if isinstance(place, Path):
        try:
            with place.open("rb") as file:
                head = file.read(256)
        except (OSError, ValueError):
            return ""  # that it is missing, or can be no path, has been said
    else:
        head = place[:256] if isinstance(place, bytes) else b"?"
    if not head:
        return "the file is empty"
    return next((what for pattern, what in _NO_PICTURE if pattern.match(head)), "")


def _notice(place: Any, shape: str, size: Size) -> str:
    ending = place.suffix.lower() if isinstance(place, Path) else ""
    if ending and shape in _ENDINGS and ending not in _ENDINGS[shape]:
        return f"the name ends in {ending}, but the picture is {shape}"
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        return "so many pixels that Pillow warns of a decompression bomb"
    return ""


def coco_image_id(image: Any, sample: dict[str, Any]) -> int:
    """The number of the COCO image that a picture is called after, or -1: its 12 digits, or the id of COCO's sample."""
    if isinstance(image, (str, Path)):
        match = _COCO_NAME.fullmatch(Path(image).stem)
        if match:
            return int(match[1])
    identity = str(sample.get("id", ""))
    match = _COCO_NAME.fullmatch(identity)
    if match:
        return int(match[1])
    known = sample.get("source") in _COCO_SOURCES and identity.isascii() and identity.isdigit() and len(identity) <= 12
    return int(identity) if known else -1


class PictureTable:
    """All pictures of a data set, about 60 bytes each and 180 more for one that is a file of its own.

    Rows are numbered in the order in which they were added. Columns are read with `column`.
    """

    _COLUMNS = {
        "width": "i", "height": "i", "length": "q", "content": "Q", "content_rest": "Q", "look": "Q", "mirrored": "Q",
        "sample": "q", "coco": "q", "format": "B", "flat": "B",
    }  # fmt: skip

    def __init__(self) -> None:
        self._columns = {name: array(code) for name, code in self._COLUMNS.items()}
        self.formats: list[str] = []
        self.problems: dict[int, Problem] = {}
        self.notices: dict[int, str] = {}
        self._rows: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._columns["width"])

    def row_of(self, key: tuple[int, int]) -> int | None:
        """The row of the picture whose path has a hash, if it was added."""
        return self._rows.get(key)

    def add(self, picture: Picture, key: tuple[int, int] | None = None) -> int:
        """Add a picture; return its row. `key` is the hash of its path, if it is a file."""
        row = len(self)
        if picture.format not in self.formats:
            self.formats.append(picture.format)
        width, height = picture.size or (0, 0)
        values = {"width": width, "height": height, "length": picture.length, "look": picture.look}
        values |= {"content": picture.content[0], "content_rest": picture.content[1], "mirrored": picture.mirrored}
        values |= {"sample": -1, "coco": -1, "flat": picture.flat, "format": self.formats.index(picture.format)}
        for name, column in self._columns.items():
            column.append(values[name])
        if picture.problem is not None:
            self.problems[row] = picture.problem
        if picture.notice:
            self.notices[row] = picture.notice
        if key is not None:
            self._rows[key] = row
        return row

    def name_first(self, row: int, sample: int, coco: int) -> None:
        """Note which sample was the first to name a picture, and its COCO image id if that tells one."""
        if self._columns["sample"][row] < 0:
            self._columns["sample"][row] = sample
        if self._columns["coco"][row] < 0:
            self._columns["coco"][row] = coco

    def first_sample(self, row: int) -> int:
        """The number of the first sample that names a picture."""
        return int(self._columns["sample"][row])

    def size(self, row: int) -> Size | Problem:
        """Width and height of a picture, or what is wrong with it."""
        if row in self.problems:
            return self.problems[row]
        return self._columns["width"][row], self._columns["height"][row]

    def column(self, name: str) -> npt.NDArray[Any]:
        """A copy of one column, ``(pictures,)``."""
        return np.array(self._columns[name])

    @property
    def sound(self) -> npt.NDArray[np.bool_]:
        """Which pictures could be decoded, ``(pictures,)``."""
        return self.column("width") > 0


def path_key(place: Path) -> tuple[int, int]:
    """The hash by which a picture's file is known, however its path is written."""
    return digest(os.path.abspath(place).encode("utf-8", "surrogatepass"))


class PictureSizes:
    """Sizes of pictures as samples name them: from a table of those already decoded, else decoded now.

    Args:
        table: Pictures that are files; they are not decoded again.
        hashes: Hash those that are decoded now.

    Attributes:
        fresh: The pictures decoded now, each with the hash of its path if it is a file, in order.
        used: For every picture looked up its row in the table, or -1 - k for the k-th of `fresh`.
    """

    def __init__(self, table: PictureTable | None = None, hashes: bool = False) -> None:
        self._table = PictureTable() if table is None else table
        self._hashes = hashes
        self._known: dict[tuple[int, int], int] = {}
        self.fresh: list[tuple[Picture, tuple[int, int] | None]] = []
        self.used: list[int] = []

    def __call__(self, image: Any, folder: Path | None) -> Size | Problem:
        """Width and height of a picture after decoding it in full, or what is wrong with it."""
        place = resolve_image(image, folder)
        key = path_key(place) if isinstance(place, Path) else None
        if key is not None:
            row = self._table.row_of(key)
            row = self._known.get(key) if row is None else row
            if row is not None:
                self.used.append(row)
                if row >= 0:
                    return self._table.size(row)
                known = self.fresh[-1 - row][0]
                return known.problem or known.size or (0, 0)
        picture = look_at(image, folder, self._hashes)
        self.fresh.append((picture, key))
        self.used.append(-len(self.fresh))
        if key is not None:
            self._known[key] = -len(self.fresh)
        return picture.problem or picture.size or (0, 0)


def look_at_files(places: Sequence[Path], hashes: bool) -> list[Picture]:
    """What `look_at` says of each of some files."""
    return [look_at(place, None, hashes) for place in places]
