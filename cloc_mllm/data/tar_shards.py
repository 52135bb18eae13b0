"""WebDataset shards: tar files of `key.jpg` + `key.json` (+ `key.txt`), read at any sample through an index.

The members of one sample stand next to each other and share the name up to the first dot. The JSON holds the sample as
everywhere in this package (`caption`, `regions`, `width`, `height`, `id`, …) without `image`; without a caption there,
`key.txt` is the caption, and an image with a `key.txt` alone is a sample without regions.

A tar has no table of contents, so a reader that starts in its middle has to know where samples begin. `SHARD.tar.index`
says so, two lines of JSON: `{"format": …, "size": bytes of the shard, "samples": N}` and the N + 1 byte offsets of the
samples' beginnings and the last one's end. With it the samples a to b are one read of consecutive bytes; `tarfile` is
left to headers out of the ordinary. Measured with `scripts/benchmarks/shard_reading.py`, see docs/training.md: neither
webdataset nor `datasets` 5.2 streaming seeks in a tar, both pass every earlier member through `tarfile` first.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloc_mllm.data.files import ByteFile, is_url, read_text
from cloc_mllm.errors import ClocError

Sample = dict[str, Any]

INDEX_ENDING = ".index"
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_FORMAT = "cloc_mllm tar index 1"
_BLOCK = 512
_EXTENDED = (b"x", b"g", b"L", b"K")
"""Types of members that only describe the next one: long names and the like."""


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: the name up to the first dot of its last part, and what follows, in lower case."""
    folder, slash, last = name.rpartition("/")
    key, _, ending = last.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


# -- the index --------------------------------------------------------------------------------------------------------


def index_path(shard: str) -> str:
    """Where the index of a shard is."""
    return shard + INDEX_ENDING


def scan_tar(shard: str) -> npt.NDArray[np.int64]:
    """Read all headers of a shard on disk.

    Args:
        shard: Its path.

    Returns:
        ``(N + 1,)`` byte offsets of the N samples' beginnings, and of the end of the last.

    Raises:
        ClocError: It is no tar file, compressed, or cut off.
    """
    offsets, key, end, behind = [], None, 0, 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                behind = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                own = split_name(member.name)[0]
                if not member.isreg() or _is_meta(own):
                    continue
                if own != key:
                    offsets.append(member.offset)
                key, end = own, behind
        whole = ends_at(shard, behind)
    except (tarfile.TarError, OSError, EOFError) as error:
        remedy = "Shards are plain .tar files, not compressed ones; copy a shard that is cut off anew."
        raise ClocError(f"not a readable tar file: {error}", file=shard, remedy=remedy) from error
    if not whole:  # tarfile takes a header that is cut off for the end
        raise ClocError("the tar file has no end: it is cut off or damaged", file=shard, remedy="Copy it anew.")
    return np.asarray([*offsets, end], np.int64)


def ends_at(shard: str | Path, place: int) -> bool:
    """Whether a tar file on disk has its end at a place: `tarfile` takes a damaged header for the end, too."""
    with open(shard, "rb") as file:
        file.seek(place)
        return file.read(_BLOCK) == bytes(_BLOCK)


def _is_meta(key: str) -> bool:
    """Whether a member describes the shard, as webdataset's `__name__` do."""
    return re.fullmatch("__.*__", key.rpartition("/")[2]) is not None


def write_index(shard: str, offsets: Iterable[int]) -> None:
    """Write the index of a shard; it appears under its name only when it is complete.

    Args:
        shard: The finished shard.
        offsets: As `scan_tar` returns them.

    Raises:
        ClocError: It cannot be written there.
    """
    places = [int(offset) for offset in offsets]
    head = {"format": _FORMAT, "size": os.path.getsize(shard), "samples": len(places) - 1}
    path = Path(index_path(shard))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(f"{json.dumps(head)}\n{json.dumps(places, separators=(',', ':'))}\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        remedy = "Make the folder writable for one run, or copy the shards to one that is."
        raise ClocError(f"cannot write the index ({error.strerror})", file=path, remedy=remedy) from error


def read_index(shard: str, size: int) -> npt.NDArray[np.int64] | None:
    """Return what `write_index` wrote, or None if there is no index.

    Args:
        shard: Path or URL of the shard.
        size: Its length in bytes.

    Raises:
        ClocError: The index is damaged, or of another file.
    """
    text = read_text(index_path(shard))
    return None if text is None else _parse_index(shard, text, size)


def _parse_index(shard: str, text: str, size: int) -> npt.NDArray[np.int64]:
    path, remedy = index_path(shard), "Remove the index; it is built anew from the shard."
    try:
        first, second = text.splitlines()
        head, offsets = json.loads(first), np.asarray(json.loads(second), np.int64)
        known = head["format"] == _FORMAT and head["samples"] == len(offsets) - 1 and bool((np.diff(offsets) > 0).all())
        stated = int(head["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ClocError("not a readable index of a shard", file=path, remedy=remedy) from error
    if not known or offsets[-1] > stated:
        raise ClocError("not a readable index of a shard", file=path, remedy=remedy)
    if stated != size:
        problem = f"does not fit its shard, which has {size} bytes and not {stated}"
        raise ClocError(problem, file=path, remedy=remedy)
    return offsets


# -- samples ----------------------------------------------------------------------------------------------------------


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file in a piece of a tar that begins with a header.

    Args:
        data: Whole members.

    Raises:
        ValueError: There is no header where one should be.
    """
    at = 0
    while at + _BLOCK <= len(data) and data[at]:
        head = data[at : at + _BLOCK]
        # A header's checksum is that of its bytes with the checksum itself read as eight blanks.
        if _octal(head[148:156]) != sum(head) - sum(head[148:156]) + 8 * 32:
            raise ValueError("there is no tar header where the index says one is")
        kind, size = head[156:157], _octal(head[124:136])
        if kind in _EXTENDED or head[124] & 0x80:
            yield from _members_by_tarfile(data[at:])
            return
        if kind in (b"0", b"\0"):
            name = head[:100].split(b"\0", 1)[0]
            if head[257:263] == b"ustar\0" and head[345]:
                name = head[345:500].split(b"\0", 1)[0] + b"/" + name
            yield name.decode("utf-8", "surrogateescape"), data[at + _BLOCK : at + _BLOCK + size]
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _members_by_tarfile(data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name, content.read()
    except tarfile.TarError as error:
        raise ValueError(str(error)) from error


def _octal(digits: bytes) -> int:
    if digits[0] & 0x80:
        return 0  # a size of 8 GiB and more is written in binary: `members` leaves those to tarfile
    try:
        return int(digits.rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise ValueError("there is no tar header where the index says one is") from error


def sample_of_members(data: bytes, shard: str, fallback: str) -> tuple[Sample, str]:
    """A raw sample and what to call its place.

    Args:
        data: Its members, as they stand in the tar.
        shard: For messages.
        fallback: What to call it if its members have no name.

    Raises:
        ClocError: The members make up no sample.
    """
    found: dict[str, bytes] = {}
    place = fallback
    try:
        for name, content in members(data):
            key, ending = split_name(name)
            if _is_meta(key):
                continue
            if ending in found:
                raise ValueError(f"has two members called {key}.{ending}")
            place = f"member {key}"
            found[ending] = content
        if not found:
            raise ValueError("there is no sample where the index says one is")
        sample = json.loads(found["json"]) if "json" in found else {"regions": []}
        text = found["txt"].decode() if "txt" in found else None
    except (ValueError, RecursionError) as error:
        is_json = isinstance(error, (json.JSONDecodeError, RecursionError))
        problem = f"not valid JSON: {error}" if is_json else str(error)
        raise ClocError(problem, file=shard, sample=place, remedy="Mend or remove it.") from error
    if not isinstance(sample, dict):
        raise ClocError("the JSON is not an object", file=shard, sample=place, remedy="A sample is an object, {...}.")
    image = next((found[ending] for ending in IMAGE_ENDINGS if ending in found), None)
    if image is not None:
        sample["image"] = image
    if text is not None:
        sample.setdefault("caption", text.strip())
    sample.setdefault("id", place.removeprefix("member "))
    return sample, place


class TarBlock:
    """Consecutive samples of a shard, held as the bytes they have in it."""

    def __init__(self, shard: str, data: bytes, offsets: npt.NDArray[np.int64], first: int) -> None:
        self._shard, self._data, self._first = shard, data, first
        self._edges = (offsets - offsets[0]).tolist()
        self._last: tuple[int, tuple[Sample, str]] | None = None  # who asks for a sample asks where it is as well

    def __len__(self) -> int:
        return len(self._edges) - 1

    def sample(self, number: int) -> Sample:
        """The raw sample of that number in the block; `ClocError` if its members make up none."""
        return self._parse(number)[0]

    def where(self, number: int) -> tuple[str, str]:
        """File and member of a sample, for messages."""
        try:
            return self._shard, self._parse(number)[1]
        except ClocError as error:
            return self._shard, error.sample or self._fallback(number)

    def folder(self, number: int) -> None:
        """None: images are in the shard."""
        return

    def _fallback(self, number: int) -> str:
        return f"number {self._first + number}"

    def _parse(self, number: int) -> tuple[Sample, str]:
        if self._last is None or self._last[0] != number:
            data = self._data[self._edges[number] : self._edges[number + 1]]
            self._last = (number, sample_of_members(data, self._shard, self._fallback(number)))
        return self._last[1]


class TarFile:
    """A .tar shard with random access: one read a sample, or a block of consecutive ones.

    Args:
        path: Path or URL of the shard. Without an index beside it, a shard on disk is scanned for one, which is not
            written.

    Raises:
        ClocError: It cannot be read, its index does not fit it, or it is a URL without an index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._file = ByteFile(self.path)
        offsets = read_index(self.path, self._file.size)
        if offsets is None and is_url(self.path):
            remedy = f"Put {index_path(self.path)} beside it: training on the shard where it is on disk writes one."
            raise ClocError("a shard behind a URL needs its index beside it", file=self.path, remedy=remedy)
        self._offsets = scan_tar(self.path) if offsets is None else offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def block(self, start: int, stop: int) -> TarBlock:
        """The samples from `start` up to `stop`, read at once."""
        offsets = self._offsets[start : stop + 1]
        return TarBlock(self.path, self._file.read(int(offsets[0]), int(offsets[-1])), offsets, start)

    def __getitem__(self, index: int) -> Sample:
        return self._one(index).sample(0)

    def where(self, index: int) -> tuple[str, str]:
        """File and member of a sample."""
        return self._one(index).where(0)

    def folder(self, index: int) -> None:
        """None: images are in the shard."""
        return

    def _one(self, index: int) -> TarBlock:
        index = range(len(self))[index]
        return self.block(index, index + 1)
