"""Writes region-text samples as WebDataset shards, each with the index that lets training start anywhere in it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image, UnidentifiedImageError

from cloc_mllm.data.readers import Sample, resolve_image, sample_name
from cloc_mllm.data.schema import kind_of
from cloc_mllm.data.tar_shards import IMAGE_ENDINGS, write_index
from cloc_mllm.errors import ClocError

_SHARD = 4096
_BLOCK = 512


@contextmanager
def naming(sample: Sample, number: int, out: Path) -> Iterator[None]:
    """Give an error of a writer the file and the sample it is about.

    Args:
        sample: The sample being written.
        number: How many were written before it.
        out: The folder written to, named where the error names no file of its own.
    """
    try:
        yield
    except ClocError as error:
        name = error.sample if error.sample is not None else sample_name(sample, f"number {number} written")
        raise ClocError(error.problem, file=error.file or out, sample=name, remedy=error.remedy) from error


class WebDatasetWriter:
    """Writes `<name>-00000.tar`, … and their indexes; a shard appears under its name only when all are complete.

    Args:
        out: Folder to write to.
        name: Name of the shards without number and ending.
        shard: Samples in a shard.
    """

    def __init__(self, out: str | Path, name: str = "regions", shard: int = _SHARD) -> None:
        self.out = Path(out)
        self.name = name
        self.shard = shard
        self._archive: tarfile.TarFile | None = None
        self._parts: list[tuple[Path, list[int]]] = []
        self._written = 0

    def __enter__(self) -> WebDatasetWriter:
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, sample: Sample, folder: Path | None = None) -> None:
        """Adds a sample; image files are read, so that the shard is complete in itself.

        Raises:
            ClocError: The sample is a conversation, or its image is neither a file nor encoded bytes.
        """
        if kind_of(sample) != "region-text":
            raise ClocError("WebDataset shards hold region-text samples", remedy="Write conversations as Parquet.")
        with naming(sample, self._written, self.out):
            content, ending = _encoded_image(sample["image"], folder)
        record = {key: value for key, value in sample.items() if key != "image"}
        if self._archive is None or len(self._parts[-1][1]) == self.shard:
            self._next_shard()
        assert self._archive is not None
        self._parts[-1][1].append(self._archive.offset)
        key = f"{self._written:09d}"
        self._add(f"{key}.{ending}", content)
        self._add(f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
        self._written += 1

    def _add(self, name: str, content: bytes) -> None:
        assert self._archive is not None
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        self._archive.addfile(member, io.BytesIO(content))

    def _next_shard(self) -> None:
        self._close_shard()
        part = self.out / f"{self.name}-{len(self._parts):05d}.tar.part"
        self._parts.append((part, []))
        self._archive = tarfile.open(part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _close_shard(self) -> None:
        if self._archive is not None:
            self._parts[-1][1].append(self._archive.offset)
            self._archive.close()
        self._archive = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_shard()
        if error is not None:
            return
        for part, offsets in self._parts:
            shard = part.with_suffix("")
            part.replace(shard)
            write_index(str(shard), offsets)


def _encoded_image(image: Any, folder: Path | None) -> tuple[bytes, str]:
    """An image as it is stored, and the ending that says what it is."""
    place = resolve_image(image, folder)
    file = place if isinstance(place, Path) else None
    if isinstance(place, Path):
        content, ending = place.read_bytes(), place.suffix.lower().removeprefix(".")
    elif isinstance(place, bytes):
        content, ending = place, ""
    else:
        problem = f"cannot store an image of type {type(place).__name__}"
        raise ClocError(problem, remedy="Give a path or encoded bytes.")
    if ending in IMAGE_ENDINGS:
        return content, ending
    try:
        with Image.open(io.BytesIO(content)) as picture:
            found = (picture.format or "").lower()
    except UnidentifiedImageError as error:
        problem = "an image is no picture that Pillow can read"
        raise ClocError(problem, file=file, remedy="Leave the sample out.") from error
    # MPO, as many phones write, is a JPEG with further pictures behind it, which readers of JPEG do not see.
    ending = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(found, found)
    if ending not in IMAGE_ENDINGS:
        problem = f"shards do not hold {found} images"
        raise ClocError(problem, file=file, remedy=f"Convert it to one of {', '.join(IMAGE_ENDINGS)}.")
    return content, ending
