"""Writes samples: JSON lines that name images, or Parquet or WebDataset shards that hold them.

A file appears under its name only when it is complete; a run that is stopped leaves a `.part` file behind.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from cloc_mllm.data.messages import image_items, messages_of
from cloc_mllm.data.readers import Sample, resolve_image
from cloc_mllm.data.schema import kind_of
from cloc_mllm.data.tar_writer import WebDatasetWriter, naming
from cloc_mllm.errors import ClocError

FORMATS = ("jsonl", "parquet", "webdataset")
_ROW_GROUP, _SHARD = 128, 4096


class SampleWriter(Protocol):
    """Takes samples one by one; a context manager that completes the files at its end."""

    def write(self, sample: Sample, folder: Path | None = None) -> None:
        """Adds a sample whose relative image paths start from `folder`."""
        ...

    def __enter__(self) -> SampleWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class JsonlWriter:
    """Writes `<name>.jsonl`; images are referred to where they are, or copied into `images/` beside it.

    Args:
        out: Folder to write to.
        name: Name of the file without its ending.
        copy_images: Copy image files, so that the folder can be moved on its own.
    """

    def __init__(self, out: str | Path, name: str = "regions", copy_images: bool = False) -> None:
        self.out = Path(out)
        self.copy_images = copy_images
        self._target = self.out / f"{name}.jsonl"
        self._part = self._target.with_suffix(".jsonl.part")
        self._written = 0

    def __enter__(self) -> JsonlWriter:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.copy_images:
            (self.out / "images").mkdir(exist_ok=True)
        self._file = self._part.open("w", encoding="utf-8")
        return self

    def write(self, sample: Sample, folder: Path | None = None) -> None:
        """Adds a sample; its images must be files.

        Raises:
            ClocError: An image is held in memory: JSON lines cannot hold it.
        """
        with naming(sample, self._written, self.out):
            if kind_of(sample) == "region-text":
                sample = {**sample, "image": self._reference(sample["image"], folder)}
            else:
                sample = _map_images(sample, lambda image: self._reference(image, folder))
        self._written += 1
        self._file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def _reference(self, image: Any, folder: Path | None) -> str:
        place = resolve_image(image, folder)
        if not isinstance(place, Path):
            raise ClocError("an image held in memory cannot be written to JSON lines", remedy="Write Parquet instead.")
        if not self.copy_images:
            return os.path.relpath(place, self.out)
        copy = self.out / "images" / place.name
        if not copy.exists():
            _copy_whole(place, copy)
        if not filecmp.cmp(place, copy, shallow=False):
            raise ClocError(f"two different images are called {place.name}", file=place, remedy="Rename one of them.")
        return f"images/{place.name}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            self._part.replace(self._target)


def _copy_whole(picture: Path, copy: Path) -> None:
    """Copy a picture so that its name never stands for half of it, and never comes to stand for another process's."""
    part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(picture, part)
        try:
            os.link(part, copy)
        except FileExistsError:
            return  # another process was faster; the caller compares
        except OSError:
            os.replace(part, copy)  # a file system without links
    finally:
        part.unlink(missing_ok=True)


class ParquetWriter:
    """Writes `<name>-00000.parquet`, ... with the encoded images inside, as `datasets` stores them.

    Args:
        out: Folder to write to.
        name: Name of the shards without number and ending.
        shard: Samples in a shard.
    """

    def __init__(self, out: str | Path, name: str = "regions", shard: int = _SHARD) -> None:
        self.out = Path(out)
        self.name = name
        self.shard = shard
        self._rows: list[dict[str, Any]] = []
        self._conversations: bool | None = None
        self._writer: Any = None
        self._in_shard = self._written = 0
        self._shards: list[Path] = []

    def __enter__(self) -> ParquetWriter:
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, sample: Sample, folder: Path | None = None) -> None:
        """Adds a sample; image files are read, so that the shard is complete in itself.

        Raises:
            ClocError: Region-text samples and conversations are mixed, or it is an evaluation question.
        """
        kind = kind_of(sample)
        if kind == "question":
            raise ClocError("evaluation questions are kept as JSON lines", remedy="Write them with JsonlWriter.")
        if self._conversations not in (None, kind == "conversation"):
            raise ClocError("a Parquet file holds one kind of sample", remedy="Use a writer for each kind.")
        self._conversations = kind == "conversation"
        with naming(sample, self._written, self.out):
            row = _conversation_row(sample, folder) if self._conversations else _region_row(sample, folder)
        self._written += 1
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._rows:
            return
        schema = _arrow_schema(bool(self._conversations))
        if self._writer is None:
            part = self.out / f"{self.name}-{len(self._shards):05d}.parquet.part"
            self._shards.append(part)
            self._writer = pyarrow.parquet.ParquetWriter(part, schema)
        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=schema))
        self._in_shard += len(self._rows)
        self._rows = []
        if self._in_shard >= self.shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._in_shard = None, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._close_shard()
        if error is None:
            for part in self._shards:
                part.replace(part.with_suffix(""))


def _map_images(sample: Sample, change: Callable[[Any], Any]) -> Sample:
    """A copy of a conversation in which every image reference went through `change`."""
    sample = dict(sample)
    for key in ("image", "images"):
        if key in sample:
            value = sample[key]
            sample[key] = [change(image) for image in value] if isinstance(value, list) else change(value)
    if "messages" in sample:
        sample["messages"] = [
            {
                **message,
                "content": message["content"]
                if isinstance(message["content"], str)
                else [
                    {**item, "image": change(item["image"])} if item["type"] == "image" and "image" in item else item
                    for item in message["content"]
                ],
            }
            for message in sample["messages"]
        ]
    return sample


def _stored_image(image: Any, folder: Path | None) -> dict[str, Any]:
    """An image as `datasets` stores it: encoded bytes and a file name."""
    place = resolve_image(image, folder)
    if isinstance(place, Path):
        return {"bytes": place.read_bytes(), "path": place.name}
    if isinstance(place, bytes):
        return {"bytes": place, "path": None}
    raise ClocError(f"cannot store an image of type {type(place).__name__}", remedy="Give a path or encoded bytes.")


def _region_row(sample: Sample, folder: Path | None) -> dict[str, Any]:
    regions = [
        {**region, "attributes": json.dumps(region["attributes"]) if "attributes" in region else None}
        for region in sample["regions"]
    ]
    return {**sample, "image": _stored_image(sample["image"], folder), "regions": regions}


def _conversation_row(sample: Sample, folder: Path | None) -> dict[str, Any]:
    """Messages as one JSON text (their items differ too much for columns), images beside them in order."""
    messages = messages_of(sample)
    bare = [
        {
            **message,
            "content": message["content"]
            if isinstance(message["content"], str)
            else [
                {key: value for key, value in item.items() if key != "image"} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in messages
    ]
    images = [_stored_image(image, folder) for image in image_items(messages)]
    kept: dict[str, Any] = {key: sample[key] for key in ("id", "task", "source") if key in sample}
    return {**kept, "images": images, "messages": json.dumps(bare)}


def _arrow_schema(conversations: bool) -> Any:
    """The Arrow schema of a shard, with the notes by which `datasets` knows the image column."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    stored: dict[str, Any]
    if conversations:
        picture = {"bytes": Value("binary"), "path": text}
        stored = {"id": text, "images": List(picture), "messages": text, "task": text, "source": text}
    else:
        region = {
            "box": List(Value("float64")),
            "text": text,
            "score": Value("float64"),
            "unique": Value("bool"),
            "attributes": text,
        }
        stored = {
            "id": text,
            "image": Image(),
            "width": Value("int32"),
            "height": Value("int32"),
            "caption": text,
            "captions": List(text),
            "regions": List(region),
            "source": text,
        }
    return Features(stored).arrow_schema


def open_writer(
    out: str | Path,
    file_format: str = "jsonl",
    name: str = "regions",
    copy_images: bool = False,
    shard: int = _SHARD,
) -> SampleWriter:
    """A writer of the format called "jsonl", "parquet" or "webdataset"; the latter two have `shard` samples a file.

    Args:
        out: Folder to write to.
        file_format: One of `FORMATS`.
        name: Name of the files without number and ending.
        copy_images: With "jsonl", copy the pictures.
        shard: Samples in a shard, of the other two.

    Raises:
        ClocError: There is no such format.
    """
    if file_format == "jsonl":
        return JsonlWriter(out, name, copy_images)
    if file_format == "parquet":
        return ParquetWriter(out, name, shard)
    if file_format == "webdataset":
        return WebDatasetWriter(out, name, shard)
    raise ClocError(f"unknown format '{file_format}'", remedy=f"Choose one of {', '.join(FORMATS)}.")
